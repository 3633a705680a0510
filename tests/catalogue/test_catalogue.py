"""Malformed and unusual inputs: each is read as it should be, or refused in one sentence."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from catalogue.annotations import annotations
from catalogue.folders import DIGITS, folders
from catalogue.images import images
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load, save

from captum_classemb.data import Preprocess, open_dataset, read_image
from captum_classemb.data.labels import read_labels
from captum_classemb.errors import CheckpointError, ClassEmbError, DataError
from captum_classemb.models import class_names, demo_vit
from captum_classemb.models.load import read_checkpoint
from captum_classemb.models.names import ClassNames
from captum_classemb.readout import LinearProbe, ProbeHeads, load_readout
from captum_classemb.readout.files import encode_readout
from captum_classemb.vit import adapt

SQUASH = Preprocess(size=(16, 16), mode="squash")
QUICK = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def refuses(act: Callable[[], Any], kind: type[ClassEmbError] = DataError) -> None:
    with pytest.raises(kind) as caught:
        act()
    sentence = str(caught.value)
    assert sentence and len(sentence) < 1500


def test_catalogue_is_long_enough() -> None:
    rows = [*images(), *annotations(), *folders(), *LABEL_FILES, *PROBES, *CHECKPOINTS]
    names = [(len(row), row[0]) for row in rows]
    assert len(rows) >= 300 and len(set(names)) >= 0.97 * len(rows)


# -- Images


@pytest.mark.parametrize(("good", "content"), [pytest.param(*r[1:], id=r[0]) for r in images()])
def test_image(good: bool, content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(content)
    if not good:
        refuses(lambda: read_image(file))
        return
    image = read_image(file)
    assert image.mode == "RGB"
    # A study reads the very same pixels, and the model the very same tensor.
    data = open_dataset(tmp_path, SQUASH, labelled=False)
    assert torch.equal(data[0].image, SQUASH.tensor(SQUASH.view(image)))


@QUICK
@given(data=st.data(), kind=st.sampled_from(["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"]))
def test_damaged_image_is_read_or_refused(data: Any, kind: str, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 12), (1, 200, 3)).save(buffer, kind)
    content = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    file = tmp_path / "a"
    file.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        assert read_image(file).mode == "RGB"
    except DataError as error:
        assert str(file) in str(error)


# -- Annotations


@pytest.fixture
def annotated(tmp_path: Path) -> Path:
    for name in ("a.png", "b.png", "mask.png"):
        Image.new("L", (40, 30), 200).save(tmp_path / name)
    Image.new("L", (30, 40)).save(tmp_path / "small.png")
    (tmp_path / "text.png").write_text("no image")
    return tmp_path


@pytest.mark.parametrize(("good", "text"), [pytest.param(*r[1:], id=r[0]) for r in annotations()])
def test_annotations(good: bool, text: bytes, annotated: Path) -> None:
    (annotated / "annotations.json").write_bytes(text)

    def read() -> Any:
        data = open_dataset(annotated, SQUASH, classes=10)
        return [data[index] for index in range(len(data))]

    if good:
        samples = read()
        assert samples and all(0 <= sample.label < 10 for sample in samples)
    else:
        refuses(read)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


@QUICK
@given(
    entries=st.lists(
        st.fixed_dictionaries(
            {},
            optional={
                "file": st.sampled_from(["a.png", "b.png", "c.png"]) | JSON,
                "label": st.integers(-2, 12) | JSON,
                "boxes": st.lists(st.lists(st.floats() | st.integers(0, 30), max_size=5)) | JSON,
                "mask": st.sampled_from(["mask.png", "none.png"]) | JSON,
                "frame": st.sampled_from(["stored", "upright"]) | JSON,
            },
        ),
        max_size=3,
    )
)
def test_annotations_of_any_kind(entries: Any, annotated: Path) -> None:
    (annotated / "annotations.json").write_text(json.dumps(entries))
    try:
        data = open_dataset(annotated, SQUASH, classes=10)
    except DataError:
        return
    for entry, sample in zip(entries, (data[i] for i in range(len(data))), strict=True):
        assert type(entry["label"]) is int and sample.label == entry["label"]
        assert (sample.mask is not None) == bool(entry.get("boxes") or entry.get("mask"))


# -- Class folders


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    import timm

    return {
        "digits": class_names(demo_vit()),
        "imagenet": class_names(timm.create_model("test_vit")),
        "plain": class_names(timm.create_model("test_vit", num_classes=10)),
        "numbers": ClassNames([("0",), ("1",), ("2",)]),
        "reversed": ClassNames([("2",), ("1",), ("0",)]),
        "alike": ClassNames([("T-shirt",), ("t shirt",), ("boot",)]),
    }


@pytest.mark.parametrize(
    ("model", "names", "labels"), [pytest.param(*r[1:], id=r[0]) for r in folders()]
)
def test_class_folders(
    model: str, names: Any, labels: list[int] | None, models: dict[str, Any], tmp_path: Path
) -> None:
    for name in names:
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "a.png")

    def read() -> Any:
        return open_dataset(tmp_path, SQUASH, None, models[model])

    if labels is None:
        refuses(read)
        return
    data = read()
    assert {data[i].name: data[i].label for i in range(len(data))} == {
        f"{name}/a.png": label for name, label in zip(names, labels, strict=True)
    }


@QUICK
@given(order=st.permutations(DIGITS), count=st.integers(1, 10), style=st.sampled_from([0, 1, 2]))
def test_right_names_have_right_labels(order: Any, count: int, style: int, models: Any) -> None:
    from captum_classemb.data.labels import Labelling

    ways = [str.upper, str.title, str]
    chosen = {ways[style](name): DIGITS.index(name) for name in order[:count]}
    found = Labelling(models["digits"]).of_folders(list(chosen), Path("x"))
    assert dict(found.index) == chosen


# -- Files of labels: (what, whether it is read, text)

LABEL_FILES: list[tuple[str, bool, bytes]] = [
    ("JSON of indices", True, b'{"a": 3, "b": 0}'),
    ("JSON of names", True, b'{"a": "three", "b": "Zero"}'),
    ("JSON of numbers as text", True, b'{"a": "3", "b": "0"}'),
    ("more than the folders", True, b'{"a": 3, "b": 0, "c": 1}'),
    ("lines", True, b"a,3\nb,0\n"),
    ("lines of names", True, b"a,three\nb,zero"),
    ("lines with spaces", True, b"a , 3\nb, 0\n\n"),
    ("a byte order mark", True, b"\xef\xbb\xbfa,3\nb,0\n"),
    ("lines of Windows", True, b"a,3\r\nb,0\r\n"),
    ("nothing", False, b""),
    ("an empty object", False, b"{}"),
    ("a list", False, b"[]"),
    ("a list of pairs", False, b'[["a", 3], ["b", 0]]'),
    ("broken JSON", False, b'{"a": 3'),
    ("a folder twice in JSON", False, b'{"a": 3, "a": 0, "b": 1}'),
    ("a folder twice in lines", False, b"a,3\na,0\nb,1"),
    ("a folder missing", False, b'{"a": 3}'),
    ("one class twice", False, b'{"a": 3, "b": 3}'),
    ("one class in two ways", False, b'{"a": 3, "b": "three"}'),
    ("true", False, b'{"a": true, "b": 0}'),
    ("null", False, b'{"a": null, "b": 0}'),
    ("a fraction", False, b'{"a": 3.0, "b": 0}'),
    ("a list as class", False, b'{"a": [3], "b": 0}'),
    ("an object as class", False, b'{"a": {"label": 3}, "b": 0}'),
    ("out of range", False, b'{"a": 10, "b": 0}'),
    ("negative", False, b'{"a": -1, "b": 0}'),
    ("negative as text", False, b"a,-1\nb,0"),
    ("a huge number as text", False, b"a," + b"9" * 5000 + b"\nb,0"),
    ("no class of this name", False, b"a,cat\nb,zero"),
    ("one column", False, b"a\nb"),
    ("three columns", False, b"a,3,x\nb,0,y"),
    ("a broken quote", False, b'"a,3\nb,0'),
    ("UTF-16", False, "a,3\nb,0".encode("utf-16")),
    ("zeros", False, b"\0\0"),
    ("deep", False, b"[" * 100_000),
]


@pytest.mark.parametrize(("good", "text"), [pytest.param(*r[1:], id=r[0]) for r in LABEL_FILES])
def test_labels_file(good: bool, text: bytes, models: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "labels").write_bytes(text)
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "data" / name / "x.png")

    def read() -> Any:
        labels = read_labels(tmp_path / "labels")
        return open_dataset(tmp_path / "data", SQUASH, None, models["digits"], labels)

    if good:
        assert read().labels == [3, 0]
    else:
        refuses(read)


# -- Probes: (what, what becomes of the tensors and of the record)

Change = Callable[[dict[str, Any], dict[str, Any]], Any]


def without(key: str) -> Change:
    return lambda tensors, about: (tensors.pop(key, None), about.pop(key, None))


def with_record(key: str, value: Any) -> Change:
    return lambda tensors, about: about.update({key: value})


def with_tensor(key: str, value: torch.Tensor) -> Change:
    return lambda tensors, about: tensors.update({key: value})


PROBES: list[tuple[str, Change]] = [
    *((f"without {key}", without(key)) for key in ("kind", "prefix_tokens", "positions", "normed")),
    *(("kind " + repr(value), with_record("kind", value)) for value in ("", "Probe", None, 1, [])),
    *(
        (f"prefix_tokens {value!r}", with_record("prefix_tokens", value))
        for value in ("1", None, -1, 1.5, [], True, 2**40)
    ),
    *((f"positions {value!r}", with_record("positions", value)) for value in ("no", {}, 5, -1)),
    *((f"normed {value!r}", with_record("normed", value)) for value in ("yes", None, 1, [])),
    ("without a bias", without("5.resid_post.bias")),
    ("without a weight", without("5.resid_post.weight")),
    ("a name without a site", with_tensor("5.weight", torch.zeros(1))),
    ("a block that is no number", with_tensor("five.resid_post.weight", torch.zeros(2, 10, 96))),
    ("a negative block", with_tensor("-7.resid_post.weight", torch.zeros(2, 10, 96))),
    ("an unknown site", with_tensor("5.nowhere.weight", torch.zeros(2, 10, 96))),
    ("another width", with_tensor("5.resid_post.weight", torch.zeros(2, 10, 95))),
    ("a weight of one axis", with_tensor("5.resid_post.weight", torch.zeros(96))),
    ("a bias of other classes", with_tensor("5.resid_post.bias", torch.zeros(2, 9))),
    ("NaN", with_tensor("5.resid_post.weight", torch.full((2, 10, 96), torch.nan))),
    ("infinity", with_tensor("5.resid_post.bias", torch.full((2, 10), torch.inf))),
    ("whole numbers", with_tensor("5.resid_post.weight", torch.zeros(2, 10, 96, dtype=torch.int8))),
]


@pytest.fixture(scope="module")
def own() -> Any:
    return adapt(demo_vit()).readout


@pytest.fixture(scope="module")
def probe(own: Any) -> bytes:
    heads = ProbeHeads(torch.zeros(2, 10, 96), torch.zeros(2, 10))
    return encode_readout(LinearProbe(own, {(5, "resid_post"): heads}, 1))


@pytest.mark.parametrize("change", [pytest.param(row[1], id=row[0]) for row in PROBES])
def test_probe(change: Change, own: Any, probe: bytes, tmp_path: Path) -> None:
    size = int.from_bytes(probe[:8], "little")
    metadata = json.loads(probe[8 : 8 + size])["__metadata__"]
    tensors, about = load(probe), json.loads(metadata["readout"])
    change(tensors, about)
    content = save(tensors, {**metadata, "readout": json.dumps(about)})
    (tmp_path / "a.safetensors").write_bytes(content)
    refuses(lambda: load_readout(tmp_path / "a.safetensors", own), ClassEmbError)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", "[" * 9000, '{"kind": 1', "\x00"])
def test_probe_with_a_broken_record(text: str, own: Any, probe: bytes, tmp_path: Path) -> None:
    content = save(load(probe), {"format": "captum-classemb readout 1", "readout": text})
    (tmp_path / "a.safetensors").write_bytes(content)
    refuses(lambda: load_readout(tmp_path / "a.safetensors", own), ClassEmbError)


@QUICK
@given(data=st.data())
def test_damaged_probe(data: Any, own: Any, probe: bytes, tmp_path: Path) -> None:
    content = bytearray(probe)
    size = 8 + int.from_bytes(probe[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, size))] = data.draw(st.integers(0, 255))
    (tmp_path / "a").write_bytes(content)
    try:
        load_readout(tmp_path / "a", own)
    except ClassEmbError as error:
        assert str(error)


# -- Checkpoints: (what, bytes)


def _checkpoints() -> list[tuple[str, bytes]]:
    def torch_file(content: Any) -> bytes:
        buffer = io.BytesIO()
        torch.save(content, buffer)
        return buffer.getvalue()

    whole = save({"a": torch.ones(3)})
    return [
        ("nothing", b""), ("one byte", b"{"), ("text", b"weights"), ("zeros", b"\0" * 99),
        ("half a safetensors", whole[: len(whole) // 2]), ("a safetensors head", whole[:8]),
        ("a head of 2⁶³ bytes", b"\xff" * 8 + b"{}"), ("no tensors", save({})),
        ("an object", torch_file(np.random.default_rng(0))), ("a path", torch_file(Path("x"))),
        ("a list", torch_file([1, 2])), ("a tensor", torch_file(torch.ones(2))),
        ("numbers", torch_file({"a": 1})),
        ("keys that are numbers", torch_file({1: torch.ones(2)})),
        ("an empty dict", torch_file({})), ("half a file", torch_file({"a": torch.ones(99)})[:200]),
        ("a pickle of code", b"cos\nsystem\n(S'true'\ntR."), ("a zip", b"PK\x05\x06" + b"\0" * 18),
        ("nested", torch_file({"state_dict": {"model": {}}})),
    ]  # fmt: skip


CHECKPOINTS = _checkpoints()


@pytest.mark.parametrize("content", [pytest.param(row[1], id=row[0]) for row in CHECKPOINTS])
def test_checkpoint(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(content)
    refuses(lambda: read_checkpoint(tmp_path / "a.pt"), CheckpointError)
