"""What the command writes never covers an input, nor a file that it did not write."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from captum_classemb.cli import cli
from captum_classemb.data.images import find_images
from captum_classemb.data.marks import is_marked
from captum_classemb.errors import OutputError
from captum_classemb.explain import explore
from captum_classemb.explain import run as explain_run
from captum_classemb.models import demo_image_paths, demo_vit

QUICK = ("--method", "class-embedding-projection", "--device", "cpu")
Explain = Callable[..., Result]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with one photograph, cat.png."""
    shutil.copy(demo_image_paths()[0], tmp_path / "cat.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def explain(*words: str) -> Result:
    return CliRunner().invoke(cli, ["explain", *words, *QUICK])


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def refused_before_a_model_loads(words: tuple[str, ...], here: Path, message: str) -> None:
    before = snapshot(here)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(explain_run, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
        result = explain(*words)
    assert result.exit_code == 2, result.output
    (line,) = result.output.splitlines()
    assert message in line
    assert snapshot(here) == before


@pytest.mark.parametrize("more", [(), ("--overwrite",)])
@pytest.mark.parametrize(
    "words",
    [
        ("cat.png", "--output", "."),
        ("cat.png", "--output", "../{here}"),
        ("cat.png", "--html", "cat.png"),
        ("cat.png", "--html", "./sub/../cat.png"),
        ("link/cat.png", "--output", "."),
        ("cat.png", "--output", "link"),
        ("other.jpg", "--output", "linked"),
        (".", "--output", "."),
    ],
)
def test_inputs_are_never_written_over(
    words: tuple[str, ...], more: tuple[str, ...], here: Path
) -> None:
    """Whatever the way to them: other folders, symbolic and hard links."""
    (here / "sub").mkdir()
    (here / "link").symlink_to(here)
    (here / "linked").mkdir()
    shutil.copy(here / "cat.png", here / "other.jpg")
    os.link(here / "other.jpg", here / "linked/other.png")
    given = tuple(word.format(here=here.name) for word in words)
    refused_before_a_model_loads((*given, *more), here, "is an input")


@pytest.mark.parametrize("option", ["--checkpoint", "--readout"])
def test_weights_are_inputs_too(option: str, here: Path) -> None:
    (here / "page.html").write_text("weights")
    words = ("cat.png", option, "page.html", "--html", "page.html")
    if option == "--readout":
        words = ("cat.png", option, "out/cat.json", "--output", "out")
        (here / "out").mkdir()
        (here / "out/cat.json").write_text("weights")
    refused_before_a_model_loads((*words, "--overwrite"), here, "is an input")


STRANGERS = {
    "out/cat.png": b"my picture", "out/cat.npz": b"PK\x03\x04", "out/cat.json": b'{"mine": 1}',
    "page.html": b"<html>mine</html>",
}  # fmt: skip


@pytest.mark.parametrize("name", STRANGERS)
def test_files_of_others_need_a_word(name: str, here: Path) -> None:
    (here / "out").mkdir()
    (here / name).write_bytes(STRANGERS[name])
    where = ("--html", name) if name.endswith("html") else ("--output", "out")
    refused_before_a_model_loads(("cat.png", *where), here, "was not written by captum-classemb")
    assert explain("cat.png", *where, "--overwrite").exit_code == 0
    assert is_marked(here / name)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"3", b"[" * 9000, b"\xff\xfe"])
@pytest.mark.parametrize("suffix", ["json", "png", "npz"])
def test_files_of_any_content_are_of_others(suffix: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / f"a.{suffix}").write_bytes(content)
    assert not is_marked(tmp_path / f"a.{suffix}")


def test_results_of_before_are_replaced_without_a_word(here: Path) -> None:
    for where in (("--output", "out"), ("--html", "page.html")):
        for _ in range(2):
            result = explain("cat.png", *where)
            assert result.exit_code == 0, result.output
    written = ("out/cat.png", "out/cat.npz", "out/cat.json", "page.html")
    assert all(is_marked(here / name) for name in written)
    assert json.loads((here / "out/cat.json").read_text())["written_by"] == "captum-classemb"


def test_a_folder_in_the_place_of_a_file(here: Path) -> None:
    (here / "out/cat.npz").mkdir(parents=True)
    refused_before_a_model_loads(("cat.png", "--output", "out"), here, "is a folder")


def test_a_file_that_appears_meanwhile_stays(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = explain_run._archive

    def late(*given: object) -> bytes:
        (here / "out").mkdir(exist_ok=True)
        (here / "out/cat.json").write_text("mine")
        return archive(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(explain_run, "_archive", late)
    result = explain("cat.png", "--output", "out")
    assert result.exit_code == 2 and "was not written by" in result.output
    assert (here / "out/cat.json").read_text() == "mine"


def test_own_pictures_are_not_explained_again(here: Path) -> None:
    assert explain(".", "--output", "out").exit_code == 0
    assert [path.name for path in find_images(here)] == ["cat.png"]
    again = explain(".", "--output", "out")
    assert again.exit_code == 0 and len(list((here / "out").iterdir())) == 3


def test_a_page_from_python(here: Path) -> None:
    page = explore(demo_vit(), here / "cat.png")
    with pytest.raises(OutputError, match="is no page"):
        page.save(here / "cat.png")
    page.save(here / "page.html")
    page.save(here / "page.html")
    assert is_marked(here / "page.html")


NAMES = [
    "x" * 244 + ".png", "x" * 251 + ".png", "é" * 125 + ".png", "猫" * 83 + ".png",
    "$x$.png", "$\\frac.png", "a b\tc.png", "new\nline.png", "-.png", "~.png", "%s.png", "{0}.png",
    "a.b.c.png", "<b>.png", "'quote\".png", b"\xff\xfe.png".decode(errors="surrogateescape"),
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_names_of_any_kind(name: str, here: Path) -> None:
    shutil.move(here / "cat.png", here / name)
    result = explain("./" + name, "--output", "out")
    assert result.exit_code == 0, result.output
    assert len(list((here / "out").iterdir())) == 3
    page = explain("./" + name, "--html", "page.html")
    assert page.exit_code == 0, page.output


def test_two_long_names_stay_apart(here: Path) -> None:
    for end in ("a", "b"):
        shutil.copy(here / "cat.png", here / f"{'x' * 245}{end}.png")
    result = explain(".", "--output", "out")
    assert result.exit_code == 0, result.output
    assert len(list((here / "out").glob("*.png"))) == 3


def test_the_first_of_several_frames_is_said(here: Path) -> None:
    frames = [Image.fromarray(np.full((40, 40, 3), value, np.uint8)) for value in (0, 90, 200)]
    frames[0].save(here / "cat.gif", save_all=True, append_images=frames[1:])
    result = explain("cat.gif", "--output", "out")
    assert result.exit_code == 0, result.output
    assert "cat.gif holds 3 images: the first is explained." in result.output
    assert json.loads((here / "out/cat.json").read_text())["image"]["frames"] == 3


@pytest.mark.parametrize(
    ("words", "suggested"),
    [("cat", ("tiger cat", "Egyptian cat")), ("shark", ("great white shark", "hammerhead"))],
)
def test_a_word_of_names_is_answered_with_them(words: str, suggested: tuple[str, ...]) -> None:
    import timm

    from captum_classemb.errors import TargetError
    from captum_classemb.models import class_names

    with pytest.raises(TargetError) as caught:
        class_names(timm.create_model("test_vit")).find(words)
    assert all(repr(name) in str(caught.value) for name in suggested[:1])
