from __future__ import annotations

import csv
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from captum_classemb.data import Preprocess, open_dataset, recognise_layout
from captum_classemb.data.splits import TrainAndTest
from captum_classemb.errors import DataError

SQUASH = Preprocess(size=(16, 16), mode="squash")
WNIDS = ["n01440764", "n01443537"]


def save_image(path: Path, size: tuple[int, int] = (32, 32), value: int = 128) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, value, value)).save(path)


def save_ids(path: Path, ids: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    colours = np.stack([ids % 256, ids // 256, np.zeros_like(ids)], -1).astype(np.uint8)
    Image.fromarray(colours).save(path)


def imagenet_s(root: Path, listed: int | None = 2) -> Path:
    """Two classes of 300, two images each: left half object, the rest ignored or another class."""
    home = root / "ImageNetS300"
    names = sorted([*WNIDS, *(f"n{99000000 + i}" for i in range(298))])
    (root / "data/categories").mkdir(parents=True)
    listing = root / "data/categories/ImageNetS_categories_im300.txt"
    listing.write_text("\n".join(names[::-1]))
    for wnid in WNIDS:
        identity = names.index(wnid) + 1
        for i in range(2):
            save_image(home / f"validation/{wnid}/{wnid}_{i}.JPEG")
            ids = np.zeros((32, 32), dtype=int)
            ids[:, :16] = identity
            ids[:8, 16:] = 1000
            ids[8:16, 16:] = 250
            save_ids(home / f"validation-segmentation/{wnid}/{wnid}_{i}.png", ids)
    if listed is not None:
        with (home / "validation_stim_info.csv").open("w", newline="") as lines:
            writer = csv.writer(lines)
            writer.writerow(["imagenet_id", "index", "cat", "img_name", "img_index"])
            for place, wnid in enumerate(WNIDS[:listed]):
                for i in range(2):
                    writer.writerow([wnid, place, "fish", f"{wnid}_{i}.JPEG", i])
    return home


def test_imagenet_s_reads_ids_labels_and_ignored_pixels(tmp_path: Path) -> None:
    imagenet_s(tmp_path)
    data = open_dataset(tmp_path, SQUASH, classes=1000)
    assert recognise_layout(tmp_path) == data.layout == "imagenet-s"
    assert data.labels == [0, 0, 1, 1]
    assert data.with_masks == 4
    sample = data[3]
    assert sample.name == f"{WNIDS[1]}/{WNIDS[1]}_1"
    assert sample.label == 1
    assert sample.mask is not None and sample.mask.dtype == torch.uint8
    expected = torch.zeros(16, 16, dtype=torch.uint8)
    expected[:, :8] = 1
    expected[:4, 8:] = 255
    assert torch.equal(sample.mask, expected)


def test_imagenet_s_ids_above_255_use_the_green_channel(tmp_path: Path) -> None:
    imagenet_s(tmp_path)
    categories = tmp_path / "data/categories/ImageNetS_categories_im300.txt"
    moved = [f"n{i:08d}" for i in range(290)] + WNIDS
    categories.write_text("\n".join(moved))
    ids = np.full((32, 32), 291)
    save_ids(tmp_path / f"ImageNetS300/validation-segmentation/{WNIDS[0]}/{WNIDS[0]}_0.png", ids)
    mask = open_dataset(tmp_path, SQUASH)[0].mask
    assert mask is not None and bool((mask == 1).all())


def test_imagenet_s_list_decides_what_belongs(tmp_path: Path) -> None:
    home = imagenet_s(tmp_path, listed=1)
    assert open_dataset(home, SQUASH).labels == [0, 0]
    (home / "validation_stim_info.csv").unlink()
    assert open_dataset(home, SQUASH).labels == [0, 0, 1, 1]


def test_imagenet_s_names_missing_files_and_counts_them(tmp_path: Path) -> None:
    home = imagenet_s(tmp_path)
    gone = home / f"validation-segmentation/{WNIDS[0]}/{WNIDS[0]}_1.png"
    gone.unlink()
    (home / f"validation/{WNIDS[1]}/{WNIDS[1]}_0.JPEG").unlink()
    with pytest.raises(DataError, match="2 problems.*is missing") as caught:
        open_dataset(tmp_path, SQUASH)
    assert str(gone) in str(caught.value)


def test_imagenet_s_refuses_a_mask_of_another_size_and_another_label(tmp_path: Path) -> None:
    home = imagenet_s(tmp_path)
    path = home / f"validation-segmentation/{WNIDS[0]}/{WNIDS[0]}_0.png"
    save_ids(path, np.ones((16, 32), dtype=int))
    with pytest.raises(DataError, match="32×16 and its image 32×32"):
        open_dataset(tmp_path, SQUASH)
    listing = home / "validation_stim_info.csv"
    listing.write_text(listing.read_text().replace(",0,fish", ",5,fish"))
    with pytest.raises(DataError, match="gives n01440764_0 the label 5"):
        open_dataset(tmp_path, SQUASH)


def test_imagenet_s_without_category_list(tmp_path: Path) -> None:
    imagenet_s(tmp_path)
    (tmp_path / "data/categories/ImageNetS_categories_im300.txt").unlink()
    with pytest.raises(DataError, match="no category list"):
        open_dataset(tmp_path, SQUASH)


def test_class_folder_counts_names_and_reads_masks(tmp_path: Path) -> None:
    for name in ("dog", "cat"):
        save_image(tmp_path / f"{name}/a.png")
    data = open_dataset(tmp_path, SQUASH, labels="sorted")
    assert (data.layout, data.labels, data.with_masks) == ("folder", [0, 1], 0)
    assert data[0].mask is None and data[0].name == "cat/a.png"
    half = np.zeros((32, 32), dtype=np.uint8)
    half[16:] = 200
    for name in ("dog", "cat"):
        (tmp_path / "masks" / name).mkdir(parents=True)
        Image.fromarray(half).save(tmp_path / f"masks/{name}/a.png")
    mask = open_dataset(tmp_path, SQUASH, labels="sorted")[1].mask
    assert mask is not None
    assert mask[:8].sum() == 0 and bool((mask[8:] == 1).all())
    (tmp_path / "masks/dog/a.png").unlink()
    with pytest.raises(DataError, match="1 problem: mask .*dog/a.png is missing"):
        open_dataset(tmp_path, SQUASH, labels="sorted")


def test_class_folder_with_boxes_and_wordnet_ids(tmp_path: Path) -> None:
    save_image(tmp_path / f"images/{WNIDS[1]}/a.png")
    (tmp_path / "boxes.json").write_text(json.dumps({f"{WNIDS[1]}/a.png": [[0, 0, 16, 32]]}))
    data = open_dataset(tmp_path, SQUASH, classes=1000)
    assert data.labels == [1]
    mask = data[0].mask
    assert mask is not None and mask[:, :8].all() and not mask[:, 8:].any()
    (tmp_path / "boxes.json").write_text("{}")
    with pytest.raises(DataError, match="no entry in boxes.json"):
        open_dataset(tmp_path, SQUASH, classes=1000)


def test_class_folder_refuses_more_classes_than_outputs(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        save_image(tmp_path / f"{name}/x.png")
    with pytest.raises(DataError, match="3 class folders and the model 2"):
        open_dataset(tmp_path, SQUASH, classes=2, labels="sorted")


def test_annotated_folder_scales_boxes_with_the_image(tmp_path: Path) -> None:
    save_image(tmp_path / "a.png", (64, 32))
    entries = [{"file": "a.png", "label": 3, "boxes": [[32, 8, 64, 16]]}]
    (tmp_path / "annotations.json").write_text(json.dumps(entries))
    data = open_dataset(tmp_path, SQUASH)
    assert (data.layout, data.labels) == ("annotations", [3])
    mask = data[0].mask
    assert mask is not None
    expected = torch.zeros(16, 16, dtype=torch.uint8)
    expected[4:8, 8:] = 1
    assert torch.equal(mask, expected)
    with pytest.raises(DataError, match="label 3, and the model 3 classes"):
        open_dataset(tmp_path, SQUASH, classes=3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "no valid JSON"),
        ("{}", "list of objects"),
        ('[{"file": "a.png", "label": 0, "boxes": [[5, 0, 1, 2]]}]', "x0 < x1"),
        ('[{"file": "b.png", "label": 0}]', "b.png is missing"),
    ],
)
def test_annotated_folder_refuses(tmp_path: Path, text: str, message: str) -> None:
    save_image(tmp_path / "a.png")
    (tmp_path / "annotations.json").write_text(text)
    with pytest.raises(DataError, match=message):
        open_dataset(tmp_path, SQUASH)


def cifar(root: Path) -> Path:
    home = root / "cifar-100-python"
    home.mkdir()
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (3, 3072), dtype=np.uint8)
    for name in ("train", "test"):
        (home / name).write_bytes(pickle.dumps({"data": pixels, "fine_labels": [5, 0, 99]}))
    (home / "meta").write_bytes(pickle.dumps({"fine_label_names": [str(i) for i in range(100)]}))
    return home


def test_cifar100_is_read_through_torchvision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = cifar(tmp_path)
    with pytest.raises(DataError, match="incomplete or damaged"):
        open_dataset(tmp_path, SQUASH)
    monkeypatch.setattr("torchvision.datasets.CIFAR100._check_integrity", lambda _: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    data = open_dataset(home, SQUASH, classes=100)
    assert (data.layout, data.labels, data[2].label, data[0].mask) == (
        "cifar100",
        [5, 0, 99],
        99,
        None,
    )
    with pytest.raises(DataError, match="CIFAR-100 has 100 classes, and the model 10"):
        open_dataset(home, SQUASH, classes=10)


def test_layout_can_be_forced_and_unknown_ones_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no known layout"):
        open_dataset(tmp_path, SQUASH)
    with pytest.raises(DataError, match="is no folder"):
        open_dataset(tmp_path / "nowhere", SQUASH)
    save_image(tmp_path / "x/a.png")
    (tmp_path / "annotations.json").write_text(json.dumps([{"file": "x/a.png", "label": 7}]))
    assert open_dataset(tmp_path, SQUASH).labels == [7]
    assert open_dataset(tmp_path, SQUASH, layout="folder", labels="sorted").labels == [0]
    with pytest.raises(DataError, match="layout 'zip' is unknown"):
        open_dataset(tmp_path, SQUASH, layout="zip")


def test_fingerprint_follows_labels_and_files(tmp_path: Path) -> None:
    save_image(tmp_path / "a/x.png")
    save_image(tmp_path / "b/x.png")
    first = open_dataset(tmp_path, SQUASH, labels="sorted").fingerprint()
    assert open_dataset(tmp_path, SQUASH, labels="sorted").fingerprint() == first
    save_image(tmp_path / "b/x.png", (64, 64))
    second = open_dataset(tmp_path, SQUASH, labels="sorted").fingerprint()
    (tmp_path / "b").rename(tmp_path / "c")
    assert len({first, second, open_dataset(tmp_path, SQUASH, labels="sorted").fingerprint()}) == 3


def test_a_file_that_is_no_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/x.png").write_bytes(b"nothing")
    with pytest.raises(DataError, match="x.png is no image"):
        open_dataset(tmp_path, SQUASH, labels="sorted")[0]


def test_real_trees(assets: Path) -> None:
    transform = Preprocess(mode="squash")
    mini = open_dataset(assets / "mini_imagenet_s", transform, classes=1000)
    assert (mini.layout, len(mini), len(set(mini.labels)), mini.with_masks) == (
        "imagenet-s",
        195,
        39,
        195,
    )
    first = mini[0]
    assert (first.name, first.label) == ("n01514668/n01514668_0", 7)
    assert first.mask is not None and 0 < int(first.mask.sum()) < 224 * 224
    photos = open_dataset(assets / "imagenet_val", transform, classes=1000)
    assert (photos.layout, len(photos), photos.with_masks) == ("annotations", 400, 400)
    mask = photos[0].mask
    assert mask is not None
    rows, columns = torch.nonzero(mask, as_tuple=True)
    scale = 224 / 227
    box = torch.tensor([37.68, 52.68, 190.23, 202.28]) * scale
    seen = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
    assert (seen - box).abs().max() <= 0.5


TURNS = {
    1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270,
}  # fmt: skip


@pytest.mark.parametrize("kind", ["png", "jpg", "tif"])
@pytest.mark.parametrize("frame", ["stored", "upright"])
@pytest.mark.parametrize("given", ["boxes", "mask"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_and_masks_turn_with_their_image(
    orientation: int, given: str, frame: str, kind: str, tmp_path: Path
) -> None:
    """A white rectangle is its own mask, however the camera was held."""
    pixels = np.zeros((32, 64, 3), dtype=np.uint8)
    pixels[8:16, 32:64] = 255
    upright = Image.fromarray(pixels)
    turn = TURNS[orientation]
    stored = upright if turn is None else upright.transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / f"a.{kind}", exif=exif)
    shown = stored if frame == "stored" else upright
    rows, columns = np.nonzero(np.asarray(shown)[..., 0])
    box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    shown.save(tmp_path / "mask.png")
    what = [list(map(int, box))] if given == "boxes" else "mask.png"
    entry = {"file": f"a.{kind}", "label": 0, given: what, "frame": frame}
    (tmp_path / "annotations.json").write_text(json.dumps([entry]))
    sample = open_dataset(tmp_path, SQUASH)[0]
    assert sample.mask is not None
    assert torch.equal(sample.mask.bool(), sample.image[0] > 0)


def test_a_box_in_another_frame_is_refused(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (64, 32)).save(tmp_path / "a.jpg", exif=exif)
    entry = {"file": "a.jpg", "label": 0, "boxes": [[0, 40, 20, 60]]}
    (tmp_path / "annotations.json").write_text(json.dumps([entry]))
    with pytest.raises(DataError, match='"frame": "upright"'):
        open_dataset(tmp_path, SQUASH)
    (tmp_path / "annotations.json").write_text(json.dumps([{**entry, "frame": "upright"}]))
    assert open_dataset(tmp_path, SQUASH)[0].mask is not None


@pytest.mark.parametrize(
    ("stray", "message"),
    [
        ("stray.png", "stray.png lies in no class folder"),
        ("0/sub/deep.png", "0/sub/deep.png lies below a class folder"),
        ("5/", "the class folder 5 holds no image"),
    ],
)
def test_what_belongs_to_no_class_is_named(stray: str, message: str, tmp_path: Path) -> None:
    for name in ("0", "1"):
        save_image(tmp_path / name / "a.png")
    if stray.endswith("/"):
        (tmp_path / stray).mkdir()
    else:
        save_image(tmp_path / stray)
    with pytest.raises(DataError, match=message):
        open_dataset(tmp_path, SQUASH, classes=10)
    assert len(open_dataset(tmp_path, SQUASH, labelled=False)) == (2 if stray == "5/" else 3)


def test_images_without_labels(tmp_path: Path) -> None:
    for name in ("b.tif", "a.gif", "sub/c.webp", ".hidden.png", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        if not name.endswith("txt"):
            Image.new("RGB", (8, 8)).save(tmp_path / name)
    data = open_dataset(tmp_path, SQUASH, labelled=False)
    assert data.layout == "images"
    assert [data[i].name for i in range(len(data))] == ["a.gif", "b.tif", "sub/c.webp"]
    assert data.labels == [-1, -1, -1]
    for layout in (None, "images"):
        with pytest.raises(DataError, match="labels|lies"):
            open_dataset(tmp_path / "sub", SQUASH, layout)


def test_a_training_set_of_other_folders_is_refused(tmp_path: Path) -> None:
    for name in ("test/a", "test/b", "train/b", "train/c"):
        save_image(tmp_path / name / "x.png")
    test, train = (
        open_dataset(tmp_path / part, SQUASH, None, 3, "sorted") for part in ("test", "train")
    )
    with pytest.raises(DataError, match="folder b is class 1 of the data and class 0"):
        TrainAndTest(test, train)
