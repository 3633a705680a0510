"""Scenes as a named dataset, and a test set beside what is fitted on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from captum_classemb.data import Preprocess, Scenes, open_dataset, recognise_layout
from captum_classemb.data.splits import TrainAndTest
from captum_classemb.errors import DataError

AS_IS = Preprocess(size=(64, 64), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def test_the_word_scenes_is_the_test_split_in_the_order_of_its_classes() -> None:
    data = open_dataset("scenes", AS_IS, classes=10)
    assert recognise_layout(Path("scenes")) == data.layout == "scenes"
    assert len(data) == data.with_masks == 5000
    assert data.labels == sorted(Scenes("test").labels)
    index = 3 * 500 + 7
    sample, scene = data[index], Scenes("test")[7 * 10 + 3]
    assert sample.name == scene.name and sample.label == scene.label == data.labels[index] == 3
    torch.testing.assert_close(sample.image, scene.image)
    assert sample.mask is not None and scene.mask is not None
    assert torch.equal(sample.mask, scene.mask)


def test_every_split_has_a_name_and_a_fingerprint() -> None:
    sizes = {"scenes:train": 20_000, "scenes:val": 2_000, "scenes:test": 5_000}
    found = {name: open_dataset(name, AS_IS) for name in sizes}
    assert {name: len(data) for name, data in found.items()} == sizes
    assert len({data.fingerprint() for data in found.values()}) == 3
    again = open_dataset("scenes", AS_IS)
    assert again.fingerprint() == found["scenes:test"].fingerprint()
    assert again.training().fingerprint() == found["scenes:train"].fingerprint()  # type: ignore[attr-defined]


def test_a_folder_called_scenes_is_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "scenes").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="no known layout"):
        recognise_layout(Path("scenes"))


def test_what_is_no_split_and_what_does_not_fit() -> None:
    with pytest.raises(DataError, match="is no folder"):
        open_dataset("scenes:extra", AS_IS)
    with pytest.raises(DataError, match="scenes:extra is no split of the scenes"):
        open_dataset("scenes:extra", AS_IS, layout="scenes")
    with pytest.raises(DataError, match="10 classes, and the model 1000"):
        open_dataset("scenes", AS_IS, classes=1000)


def test_test_set_first_then_what_is_fitted_on() -> None:
    test, train = (open_dataset(f"scenes:{split}", AS_IS) for split in ("test", "val"))
    both = TrainAndTest(test, train)
    assert len(both) == 7000 and both.labels == test.labels + train.labels
    assert both.with_masks == 7000 and both.layout == "scenes"
    assert [both.trains(i) for i in (0, 4999, 5000, 6999)] == [False, False, True, True]
    assert both[4999].name == test[4999].name and both[5000].name == train[0].name
    assert both.fingerprint() not in (test.fingerprint(), train.fingerprint())
    assert both.fingerprint() != TrainAndTest(train, test).fingerprint()
