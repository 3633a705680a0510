"""Exit codes, one-line errors, and a start that loads nothing heavy."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from command_line import Explain

from captum_classemb import cli as commands
from captum_classemb.attr import METHODS
from captum_classemb.cli import cli
from captum_classemb.errors import DataError
from captum_classemb.explain import subject as explain_subject


def test_debug_shows_the_traceback(explain: Explain, photos: Path) -> None:
    result = explain(photos, "--target", "crane", "--debug")
    assert result.exit_code == 1
    assert type(result.exception).__name__ == "TargetError"


@pytest.mark.parametrize("debug", [False, True])
def test_bug_is_one_line_too(
    debug: bool, explain: Explain, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise KeyError("surprise")

    monkeypatch.setattr("captum_classemb.explain.Run", broken)
    result = explain(photos, *(["--debug"] if debug else []))
    assert result.exit_code == 1
    if debug:
        assert isinstance(result.exception, KeyError)
    else:
        (line,) = result.output.splitlines()
        assert line.startswith("Error: KeyError: 'surprise'")
        assert "--debug" in line


def test_interruption_has_an_exit_code_of_its_own(
    explain: Explain, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("captum_classemb.explain.Run", interrupted)
    result = explain(photos)
    assert result.exit_code == 130
    assert "Traceback" not in result.output


def test_further_commands_have_the_same_manners() -> None:
    @cli.command("fail")
    @commands.debug_option
    def fail() -> None:
        raise DataError("The data\nare missing.")

    try:
        result = CliRunner().invoke(cli, ["fail"])
        assert (result.exit_code, result.output) == (2, "Error: The data are missing.\n")
        debugged = CliRunner().invoke(cli, ["fail", "--debug"])
        assert isinstance(debugged.exception, DataError)
    finally:
        cli.commands.pop("fail")


@pytest.mark.parametrize("command", ["explain", "maps"])
def test_choices_are_the_methods_that_need_nothing_beside_a_model(command: str) -> None:
    words = [command, "--method", "saliency"]
    words += ["--data", "scenes", "--output", "nowhere"] if command == "maps" else []
    result = CliRunner().invoke(cli, words)
    assert result.exit_code == 2
    for name, method in METHODS.items():
        assert (f"'{name}'" in result.output) == (not method.needs)


@pytest.mark.parametrize("page", [False, True])
@pytest.mark.parametrize(("terminal", "quiet"), [(True, False), (True, True), (False, False)])
def test_a_terminal_is_told_that_a_model_loads_before_it_does(
    page: bool, terminal: bool, quiet: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stderr = io.StringIO()
    monkeypatch.setattr(stderr, "isatty", lambda: terminal)
    monkeypatch.setattr(sys, "stderr", stderr)
    at_load = []
    load_model = explain_subject.load_model

    def watched(*args: Any, **options: Any) -> Any:
        # An untrained one on "meta" is no load that takes time.
        if not options.get("random_init"):
            at_load.append(stderr.getvalue())
        return load_model(*args, **options)

    monkeypatch.setattr(explain_subject, "load_model", watched)
    words = ["explain", "--method", "class-embedding-projection", "--output", str(tmp_path)]
    words += ["--html", str(tmp_path / "page.html")] if page else []
    cli.main([*words, *(["--quiet"] if quiet else [])], standalone_mode=False)
    assert at_load == ["loading demo_vit …\n" if terminal and not quiet else ""]
    assert stderr.getvalue().count("loading") == int(terminal and not quiet)


def run(*words: str, code: str = "") -> subprocess.CompletedProcess[str]:
    start = ["-c", code] if code else ["-m", "captum_classemb"]
    return subprocess.run(
        [sys.executable, *start, *words], capture_output=True, text=True, timeout=120
    )


def test_help_and_mistyped_arguments_need_no_heavy_library() -> None:
    code = (
        "import sys, captum_classemb.cli as c\n"
        "try: c.main()\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules and 'matplotlib' not in sys.modules"
    )
    for words in (["--help"], ["explain", "--help"], ["explain", "--colour"]):
        process = run(*words, code=code)
        assert process.returncode == 0, process.stderr


def test_module_is_the_command(photos: Path, tmp_path: Path) -> None:
    assert run("--version").stdout.startswith("captum-classemb, version ")
    words = (str(photos), "--model", "nothing_like_it", "--output", str(tmp_path / "out"))
    process = run("explain", *words)
    assert process.returncode == 2
    assert process.stdout == ""
    (line,) = process.stderr.splitlines()
    assert line.startswith("Error: No model is named 'nothing_like_it'")
