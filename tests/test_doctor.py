"""What the check-up says, with and without a network."""

from __future__ import annotations

import pytest
import torch
from click.testing import CliRunner
from huggingface_hub import HfApi, constants

from captum_classemb.cli import cli
from captum_classemb.doctor import check_up


@pytest.fixture(autouse=True)
def reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(HfApi, "model_info", lambda *_, **__: object())


def test_versions_devices_and_extras() -> None:
    found = dict(check_up())
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert found["extra studies"] == "complete"
    assert found["published weights"].startswith("reached")
    assert "cpu" in found


def test_missing_library_of_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "captum_classemb.doctor._version", lambda name: None if name == "scipy" else "1"
    )
    found = dict(check_up())
    assert found["extra studies"] == "missing: scipy; pip install 'captum-classemb[studies]'"


def test_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(HfApi, "model_info", unreachable)
    assert "not reached (ConnectionError)" in dict(check_up())["published weights"]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "offline" in dict(check_up())["published weights"]


def test_command_prints_a_line_for_each() -> None:
    result = CliRunner().invoke(cli, ["doctor"])
    assert result.exit_code == 0, result.output
    assert len(result.output.splitlines()) == len(list(check_up()))


@pytest.mark.parametrize(
    "words",
    [[], ["explain"], ["doctor"], ["study"], ["study", "identifiability"], ["study", "cka"]],
)
def test_help_fits_a_screen_and_ends_with_an_example(words: list[str]) -> None:
    lines = CliRunner().invoke(cli, [*words, "--help"]).output.splitlines()
    assert len(lines) <= 40
    assert any(line.strip().startswith("Example: captum-classemb ") for line in lines[-3:])
