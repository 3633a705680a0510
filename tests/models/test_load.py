"""Models by name: weights that fit, weights that do not, and files that hold no weights."""

from __future__ import annotations

import argparse
import os
import pickle
import urllib.error
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from captum_classemb.data import Preprocess
from captum_classemb.errors import CheckpointError, InputError, ModelNameError
from captum_classemb.models.demo import demo_vit
from captum_classemb.models.load import load_model, read_checkpoint, resolve_device
from captum_classemb.models.names import class_names

NAME = "test_vit"


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return timm.create_model(NAME).state_dict()


def wrapped(state: dict[str, Tensor], wrapper: str) -> Any:
    return {
        "plain": state,
        "state_dict": {"state_dict": state, "epoch": 3},
        "model": {"model": state, "epoch": 3},
        "both": {"state_dict": {"model": state}},
        "module.": {f"module.{name}": value for name, value in state.items()},
        "model.": {f"model.{name}": value for name, value in state.items()},
        "compiled": {f"_orig_mod.module.{name}": value for name, value in state.items()},
    }[wrapper]


def assert_holds(model: torch.nn.Module, state: dict[str, Tensor]) -> None:
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=0, atol=0)


def test_safetensors(state: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(state, tmp_path / "a.safetensors")
    model = load_model(NAME, tmp_path / "a.safetensors")
    assert not model.training
    assert_holds(model, state)


FINE_TUNED: dict[str, dict[str, Any]] = {
    "other classes": {"num_classes": 7},
    "one channel": {"in_chans": 1},
    "other size": {"img_size": 192},
    "all of them": {"num_classes": 3, "in_chans": 4, "img_size": 96},
    "headless": {"num_classes": 0},
}


@pytest.mark.parametrize("name", FINE_TUNED)
@pytest.mark.parametrize("prefix", ["", "net.", "module.backbone.", "student.vit."])
def test_the_file_says_how_large_the_model_is(name: str, prefix: str, tmp_path: Path) -> None:
    torch.manual_seed(2)
    tuned = timm.create_model(NAME, **FINE_TUNED[name])
    state = {f"{prefix}{key}": value for key, value in tuned.state_dict().items()}
    if prefix:
        state |= {"loss.weight": torch.zeros(3), "n_averaged": torch.zeros(1)}
    torch.save({"state_dict": state, "args": argparse.Namespace(lr=0.1)}, tmp_path / "a.pt")
    model: Any = load_model(NAME, tmp_path / "a.pt")
    assert_holds(model, tuned.state_dict())
    assert model.num_classes == FINE_TUNED[name].get("num_classes", 1000)
    assert model.patch_embed.img_size == tuned.patch_embed.img_size


def test_what_is_given_stands_against_the_file(state: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="head.weight is 1000×64 in the file and 5×64"):
        load_model(NAME, tmp_path / "a.safetensors", num_classes=5)
    with pytest.raises(InputError, match="give --checkpoint"):
        load_model("vit_tiny_patch16_224", num_classes=5)


def test_a_folder_of_hugging_face(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3}
    config = transformers.ViTConfig(
        **sizes, intermediate_size=48, image_size=32, patch_size=8, id2label={0: "cat", 1: "dog"}
    )
    saved = transformers.ViTForImageClassification(config)
    saved.save_pretrained(tmp_path)
    model: Any = load_model(str(tmp_path))
    assert_holds(model, saved.state_dict())
    assert [class_names(model)[i] for i in range(2)] == ["cat", "dog"]
    with pytest.raises(InputError, match="Preprocess with size, mean and std"):
        Preprocess.of_model(model)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    found = Preprocess.of_model(load_model(str(tmp_path)))
    assert (found.size, found.mode, found.mean) == ((32, 32), "squash", (0.5, 0.5, 0.5))
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="holds no model of Hugging Face"):
        load_model(str(tmp_path))


def test_models_of_open_clip_need_weights_by_name() -> None:
    pytest.importorskip("open_clip")
    with pytest.raises(CheckpointError, match="one of the tags openai"):
        load_model("open_clip:ViT-B-16")
    with pytest.raises(ModelNameError, match="ViT-B-16"):
        load_model("open_clip:ViT-B-17")
    with pytest.raises(CheckpointError, match="a local file that fits"):
        load_model("open_clip:ViT-B-16", "nowhere.pt")


def test_safetensors_is_known_by_its_content(state: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(state, tmp_path / "weights.bin")
    assert_holds(load_model(NAME, tmp_path / "weights.bin"), state)


@pytest.mark.parametrize(
    "wrapper", ["plain", "state_dict", "model", "both", "module.", "model.", "compiled"]
)
def test_wrapped_state_dict(wrapper: str, state: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(wrapped(state, wrapper), tmp_path / "a.pt")
    assert_holds(load_model(NAME, tmp_path / "a.pt"), state)


@pytest.mark.parametrize("zipped", [True, False])
def test_both_formats_of_torch(zipped: bool, state: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(state, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    assert_holds(load_model(NAME, tmp_path / "a.pt"), state)


def test_dtype_and_device(state: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(state, tmp_path / "a.safetensors")
    model = load_model(NAME, tmp_path / "a.safetensors", dtype=torch.float64)
    assert {p.dtype for p in model.parameters()} == {torch.float64}


class Bomb:
    """Unpickled by a trusting reader, it leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("way", ["torch", "legacy", "pickle"])
def test_pickle_is_never_executed(way: str, state: dict[str, Tensor], tmp_path: Path) -> None:
    trace, path = tmp_path / "executed", tmp_path / "a.pt"
    content = {"state_dict": state, "extra": Bomb(trace)}
    if way == "pickle":
        path.write_bytes(pickle.dumps({"extra": Bomb(trace)}))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=way == "torch")
    with pytest.raises(CheckpointError, match="more than plain tensors, and is not executed"):
        load_model(NAME, path)
    assert not trace.exists()


@pytest.mark.parametrize("suffix", ["pt", "legacy", "safetensors"])
@pytest.mark.parametrize("share", [0.001, 0.5, 0.999])
def test_truncated(suffix: str, share: float, state: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / f"a.{suffix}"
    if suffix == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=suffix == "pt")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        load_model(NAME, path)


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", "is empty"), (b"<html>Not found</html>", "neither"), (b"hello", "neither")],
)
def test_what_is_no_checkpoint(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=words):
        load_model(NAME, tmp_path / "a.pt")


def test_missing_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere.pt does not exist"):
        load_model(NAME, tmp_path / "nowhere.pt")
    with pytest.raises(CheckpointError, match="does not exist"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("content", [{}, [torch.ones(2)], {"epoch": 3}, {1: torch.ones(2)}])
def test_what_is_no_state_dict(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"no state dict.*save model\.state_dict\(\)"):
        load_model(NAME, tmp_path / "a.pt")


def test_position_embedding_of_another_size_is_named(
    state: dict[str, Tensor], tmp_path: Path
) -> None:
    other = {**state, "pos_embed": torch.zeros(1, 146, 64)}
    save_file(other, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"pos_embed is 1×146×64 in the file and 1×101×64"):
        load_model(NAME, tmp_path / "a.safetensors")


def test_missing_and_unknown_entries_are_named(state: dict[str, Tensor], tmp_path: Path) -> None:
    short = {name: value for name, value in state.items() if name != "head.bias"}
    save_file(short, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"head\.bias is missing from the file;"):
        load_model(NAME, tmp_path / "a.safetensors")
    save_file({**state, "extra": torch.zeros(1)}, tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match="extra is unknown to the model;"):
        load_model(NAME, tmp_path / "b.safetensors")


def test_weights_of_another_model(state: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"does not fit vit_tiny.* more such entries"):
        load_model("vit_tiny_patch16_224", tmp_path / "a.safetensors")


def test_weights_that_are_no_numbers(state: dict[str, Tensor], tmp_path: Path) -> None:
    save_file({**state, "head.bias": torch.full((1000,), torch.nan)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"NaN or infinity in head\.bias"):
        load_model(NAME, tmp_path / "a.safetensors")


def test_unknown_name() -> None:
    with pytest.raises(ModelNameError, match="test_vit"):
        load_model("test_vti")


def test_failed_download_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: Any, **kwargs: Any) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(CheckpointError, match=r"downloaded \(URLError\).*--checkpoint"):
        load_model(NAME)


def test_model_without_published_weights() -> None:
    with pytest.raises(CheckpointError, match=r"no weights for vit_base_patch16_gap_224.*--check"):
        load_model("vit_base_patch16_gap_224")


@pytest.mark.parametrize(
    ("name", "file"),
    [("vit_cifar_16", "CIFAR-100"), ("deit_ensemble_16", "deit_base_trm.pth")],
)
def test_paper_models_that_need_a_file_say_which(name: str, file: str) -> None:
    with pytest.raises(CheckpointError, match=rf"--checkpoint.*{file}"):
        load_model(name)


@pytest.mark.parametrize(
    ("name", "classes", "prefix"),
    [
        ("vit_b_32", 1000, 1),
        ("vit_b_16", 1000, 1),
        ("vit_large_16", 1000, 1),
        ("vit_miil_16", 1000, 1),
        ("vit_gap_16", 1000, 0),
        ("vit_cifar_16", 100, 1),
        ("deit_ensemble_16", 1000, 1),
    ],
)
def test_paper_models_have_the_right_shape(name: str, classes: int, prefix: int) -> None:
    model = load_model(name, random_init=True, device="meta")
    assert model.num_classes == classes
    assert model.num_prefix_tokens == prefix
    assert next(model.parameters()).device.type == "meta"


def test_inner_heads_of_the_refined_model_are_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, state: dict[str, Tensor]
) -> None:
    from captum_classemb.models import load
    from captum_classemb.models.names import PAPER_MODELS, ModelSource

    unused = PAPER_MODELS["deit_ensemble_16"].unused
    monkeypatch.setattr(load, "find_model", lambda _: ModelSource(NAME, unused=unused))
    heads = {"transformerheads.0.token_fc.weight": torch.zeros(2, 2)}
    save_file({**state, **heads}, tmp_path / "a.safetensors")
    assert_holds(load_model("refined", tmp_path / "a.safetensors"), state)


def test_data_config_of_the_cifar_model() -> None:
    config = load_model("vit_cifar_16", random_init=True, device="meta").pretrained_cfg
    assert config["mean"] == config["std"] == (0.5, 0.5, 0.5)
    assert (config["crop_mode"], config["crop_pct"]) == ("squash", 1.0)


def test_random_initialisation_follows_its_seed_and_leaves_the_generator() -> None:
    before = torch.random.get_rng_state()
    first, again, other = (load_model(NAME, random_init=True, seed=s) for s in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert_holds(first, again.state_dict())
    assert not torch.equal(first.head.weight, other.head.weight)


def test_random_initialisation_takes_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="exclude each other"):
        load_model(NAME, tmp_path / "a.pt", random_init=True)


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "cpu:x", ""])
def test_absent_device(device: str) -> None:
    with pytest.raises(InputError, match="is not available here: give 'cpu'"):
        resolve_device(device)


def test_packaged_model() -> None:
    model = load_model("demo_vit")
    assert not model.training
    assert_holds(model, demo_vit().state_dict())
    assert class_names(model).find("seven") == 7


def test_packaged_model_with_other_weights(tmp_path: Path) -> None:
    untrained = load_model("demo_vit", random_init=True, seed=5)
    save_file(untrained.state_dict(), tmp_path / "a.safetensors")
    model = load_model("demo_vit", tmp_path / "a.safetensors")
    assert_holds(model, untrained.state_dict())


def test_real_weights(assets: Path) -> None:
    path = assets / "weights" / "vit_tiny_patch16_224.safetensors"
    model = load_model("vit_tiny_patch16_224", path)
    assert_holds(model, read_checkpoint(path))
