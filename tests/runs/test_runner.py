from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from runs.toy import IMAGES, Toy, ToyData

from captum_classemb.atomic_file import write_atomically
from captum_classemb.errors import DataError, InputError, OutputError
from captum_classemb.runs import RunOptions, read_rows, run_study
from captum_classemb.runs.batches import batch_plan, chosen_images
from captum_classemb.runs.storage import Checkpoint, Checkpoints

TOY = Path(__file__).parent / "toy.py"
QUIET = RunOptions(batch_size=2, checkpoint_every=4, progress=False)
RESUME = RunOptions(batch_size=2, checkpoint_every=4, resume=True, progress=False)
BATCHES = (IMAGES + 1) // 2


def environment() -> dict[str, str]:
    root = Path(__file__).parents[2]
    return {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}


def start(*arguments: Any, launcher: tuple[str, ...] = ()) -> subprocess.Popen[bytes]:
    command = [sys.executable, *launcher, str(TOY), *map(str, arguments)]
    return subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE)


def wait_for(path: Path, pattern: str, count: int) -> None:
    deadline = time.monotonic() + 60
    while len(list(path.glob(pattern))) < count:
        assert time.monotonic() < deadline, f"no {pattern} in {path}"
        time.sleep(0.01)


def undisturbed(folder: Path) -> bytes:
    run_study(Toy(), ToyData(), folder, QUIET)
    return (folder / "toy.csv").read_bytes()


def test_killed_and_resumed_gives_the_same_table_and_repeats_one_interval(tmp_path: Path) -> None:
    """While the process lives a second one is refused; once it is dead it holds nothing."""
    output, log = tmp_path / "killed", tmp_path / "log"
    process = start(output, 0.1, log)
    wait_for(output / "checkpoints", "*.ckpt", 2)
    with pytest.raises(OutputError, match="in use by another process"):
        run_study(Toy(), ToyData(), output, RESUME)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (output / "toy.csv").exists()
    run_study(Toy(log=log), ToyData(), output, RESUME)
    assert (output / "toy.csv").read_bytes() == undisturbed(tmp_path / "whole")
    taken = [int(line) for line in log.read_text().split()]
    assert set(taken) == set(range(BATCHES))
    interval = QUIET.checkpoint_every // QUIET.batch_size
    assert 0 <= len(taken) - BATCHES <= interval
    assert sorted(p.name for p in output.iterdir()) == ["run.json", "toy.csv"]


def interrupted(output: Path, after: int, twice: bool = False) -> None:
    """A run that ends by an exception after so many batches, as if killed there."""

    class StopError(Exception):
        pass

    class Stopping(Toy):
        name = "toy"

        def update(self, batch: Any) -> None:
            if batch.number == after:
                raise StopError
            super().update(batch)

    with pytest.raises(StopError):
        run_study(Stopping(twice=twice), ToyData(), output, QUIET)


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    tmp_path: Path, damage: str
) -> None:
    output, log = tmp_path / "torn", tmp_path / "log"
    interrupted(output, 7)
    newest = max((output / "checkpoints").iterdir())
    assert len(list((output / "checkpoints").iterdir())) == 2
    content = bytearray(newest.read_bytes())
    if damage == "flipped":
        content[len(content) // 2] ^= 1
    newest.write_bytes({"cut": content[:-100], "flipped": content, "empty": b""}[damage])
    with pytest.warns(UserWarning, match="incomplete: the checkpoint before it"):
        run_study(Toy(log=log), ToyData(), output, RESUME)
    assert (output / "toy.csv").read_bytes() == undisturbed(tmp_path / "whole")
    assert [int(line) for line in log.read_text().split()] == list(range(4, BATCHES))


def test_resume_without_a_checkpoint_starts_from_the_beginning(tmp_path: Path) -> None:
    interrupted(tmp_path / "early", 1)
    run_study(Toy(), ToyData(), tmp_path / "early", RESUME)
    assert (tmp_path / "early/toy.csv").read_bytes() == undisturbed(tmp_path / "whole")


def test_torchrun_gives_the_same_table_with_uneven_data(tmp_path: Path) -> None:
    """In two passes; also: what only the leader can see stops all processes with one error."""
    output, full, log = tmp_path / "two", tmp_path / "full", tmp_path / "log"
    full.mkdir()
    (full / "notes.txt").write_text("mine")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    process = start(output, 0.0, log, full, "twice", launcher=launcher)
    _, errors = process.communicate(timeout=180)
    assert process.returncode == 0, errors.decode()[-2000:]
    run_study(Toy(twice=True), ToyData(), tmp_path / "one", QUIET)
    two, one = read_rows(output / "toy.csv"), read_rows(tmp_path / "one/toy.csv")
    assert [row._replace(value=0.0) for row in two] == [row._replace(value=0.0) for row in one]
    assert [row.value for row in two] == pytest.approx([row.value for row in one], rel=1e-12)
    assert IMAGES % 2 == 1 and sum(row.n for row in two) == IMAGES
    assert sorted(p.name for p in output.iterdir()) == ["run.json", "toy.csv"]
    assert log.read_text().count("holds other files") == 2
    assert [p.name for p in full.iterdir()] == ["notes.txt"]


def test_what_a_folder_holds_decides(tmp_path: Path) -> None:
    output = tmp_path / "out"
    first = run_study(Toy(), ToyData(), output, QUIET)
    with pytest.raises(OutputError, match="holds a run already"):
        run_study(Toy(), ToyData(), output, QUIET)
    again = run_study(Toy(), ToyData(), output, RESUME)
    assert again.tables == first.tables and again.images == first.images == IMAGES
    with pytest.raises(OutputError, match=r"has scale = 1\.0 and this one 2\.0"):
        run_study(Toy(scale=2.0), ToyData(), output, RESUME)
    with pytest.raises(OutputError, match="has data.fingerprint = "):
        run_study(Toy(), ToyData(22), output, RESUME)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="holds other files"):
        run_study(Toy(), ToyData(), tmp_path / "other", QUIET)


def test_run_json_says_what_was_run(tmp_path: Path) -> None:
    options = RunOptions(batch_size=4, limit=10, progress=False)
    result = run_study(Toy(), ToyData(), tmp_path / "out", options)
    run = json.loads((tmp_path / "out/run.json").read_text())
    assert run["complete"] and run["images"] == result.images == 10
    assert run["settings"]["data"] == {
        "layout": "toy", "fingerprint": "toy-23", "images": 23, "classes": 3, "with_masks": 0,
    }  # fmt: skip
    assert {"torch", "timm", "python"} <= run["versions"].keys()
    assert sum(row.n for row in result.tables["toy"]) == 10
    assert read_rows(tmp_path / "out/toy.csv") == result.tables["toy"]


def test_workers_change_nothing(tmp_path: Path) -> None:
    options = RunOptions(batch_size=2, workers=2, progress=False)
    run_study(Toy(), ToyData(), tmp_path / "workers", options)
    assert (tmp_path / "workers/toy.csv").read_bytes() == undisturbed(tmp_path / "whole")


class Broken(ToyData):
    """Of which some images cannot be read."""

    def __init__(self, *broken: int) -> None:
        super().__init__()
        self.broken = broken

    def __getitem__(self, index: int) -> Any:
        if index in self.broken:
            raise DataError(f"image {index} cannot be read.")
        return super().__getitem__(index)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_named_and_the_rest_goes_on(workers: int, tmp_path: Path) -> None:
    """Also where a whole batch is unreadable."""
    options = RunOptions(batch_size=2, workers=workers, progress=False)
    result = run_study(Toy(), Broken(2, 3, 8), tmp_path / "out", options)
    assert result.refused == [f"image {i} cannot be read." for i in (2, 3, 8)]
    assert result.images == sum(row.n for row in result.tables["toy"]) == IMAGES - 3
    run = json.loads((tmp_path / "out/run.json").read_text())
    assert run["refused"] == result.refused and run["images"] == IMAGES - 3
    again = run_study(Toy(), Broken(2, 3, 8), tmp_path / "out", RESUME)
    assert again.refused == result.refused


def test_nothing_that_can_be_read_is_no_result(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no image could be read: image 0 cannot be read"):
        run_study(Toy(), Broken(*range(IMAGES)), tmp_path / "out", QUIET)


def test_a_limit_is_spread_and_nonsense_refused() -> None:
    assert chosen_images(100, 10) == list(range(0, 100, 10))
    assert chosen_images(5, 50) == chosen_images(5) == [0, 1, 2, 3, 4]
    assert batch_plan([4, 9, 2], 2) == [[4, 9], [2]]
    for wrong in (lambda: chosen_images(5, 0), lambda: batch_plan([1], 0)):
        with pytest.raises(InputError, match="at least 1"):
            wrong()


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        write_atomically(tmp_path / "file/x", b"")
    with pytest.raises(OutputError, match="cannot be written"):
        run_study(Toy(), ToyData(), tmp_path / "file/out", QUIET)


def test_checkpoints_of_two_ranks_do_not_meet(tmp_path: Path) -> None:
    for rank in (0, 1):
        Checkpoints(tmp_path, rank).save(Checkpoint(0, rank + 3, {}))
    loaded = [[c.done for c in Checkpoints(tmp_path, rank).load()] for rank in (0, 1, 2)]
    assert loaded == [[3], [4], []]


def test_two_ranks_that_end_at_once_remove_one_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between a process's look at the folder and its removal, the other one removes it."""
    folder = tmp_path / "checkpoints"
    for rank in (0, 1):
        Checkpoints(folder, rank).save(Checkpoint(0, 1, {}))
    Checkpoints(folder, 0).remove()
    assert folder.is_dir() and list(Checkpoints(folder, 1).load()) == [Checkpoint(0, 1, {})]
    remove = Path.rmdir

    def beaten(path: Path) -> None:
        remove(path)
        remove(path)

    monkeypatch.setattr(Path, "rmdir", beaten)
    Checkpoints(folder, 1).remove()
    assert not folder.exists()
    Checkpoints(folder, 0).remove()


def test_checkpoints_know_their_pass(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    assert list(checkpoints.load()) == []
    saved = [Checkpoint(n, done, {"in": n}) for n, done in ((0, 4), (0, 8), (1, 0))]
    for checkpoint in saved:
        checkpoints.save(checkpoint)
    assert len(list(tmp_path.iterdir())) == 2
    assert list(checkpoints.load()) == [saved[2], saved[1]]


def by_definition() -> list[float]:
    """The variance of each class, all images at once."""
    data = ToyData()
    values = torch.stack([data[i].image.exp().mean() for i in range(IMAGES)]).double()
    labels = torch.tensor(data.labels)
    return [values[labels == k].var(correction=0).item() for k in range(3)]


def test_a_second_pass_knows_what_the_first_found(tmp_path: Path) -> None:
    result = run_study(Toy(twice=True), ToyData(), tmp_path / "out", QUIET)
    found = [row.value for row in result.tables["toy"]]
    assert found == pytest.approx(by_definition(), rel=1e-5)
    assert result.images == sum(row.n for row in result.tables["toy"]) == IMAGES
    assert json.loads((tmp_path / "out/run.json").read_text())["notices"] == ["twice"]


@pytest.mark.parametrize("after", [3, BATCHES, BATCHES + 1, BATCHES + 7])
def test_stopped_in_either_pass(tmp_path: Path, after: int) -> None:
    """Also at the first batch of the second pass, which has a checkpoint of nothing."""
    output, log = tmp_path / "stopped", tmp_path / "log"
    interrupted(output, after, twice=True)
    run_study(Toy(log=log, twice=True), ToyData(), output, RESUME)
    run_study(Toy(twice=True), ToyData(), tmp_path / "whole", QUIET)
    assert (output / "toy.csv").read_bytes() == (tmp_path / "whole/toy.csv").read_bytes()
    taken = [int(line) for line in log.read_text().split()]
    interval = QUIET.checkpoint_every // QUIET.batch_size
    assert taken == list(range(taken[0], 2 * BATCHES)) and after - interval <= taken[0] <= after
    assert sorted(p.name for p in output.iterdir()) == ["run.json", "toy.csv"]
