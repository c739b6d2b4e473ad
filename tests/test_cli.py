"""The `slos-serve` command, as a caller sees it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from slos_serve.backend.cli import SUBCOMMANDS, main


def test_help_lists_every_subcommand(capsys: pytest.CaptureFixture[str]) -> None:
    """`--help` names each subcommand and what it does, whatever else is installed."""
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert ended.value.code == 0
    assert all(name in said and subcommand.help in said for name, subcommand in SUBCOMMANDS.items())


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_each_subcommand_has_a_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Every module in the table exists and declares its arguments."""
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    assert f"slos-serve {name}" in capsys.readouterr().out


@pytest.mark.parametrize("argv", [[], ["nonsense"], ["serve", "--http-port", "eight"]])
def test_wrong_arguments_end_with_code_2(argv: list[str]) -> None:
    """As every command does, with the usage on standard error."""
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == 2


def test_what_the_caller_can_mend_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A folder that is not there is told by name, without a traceback."""
    assert main(["serve", "--model-repository", str(tmp_path / "nowhere")]) == 2
    said = capfd.readouterr().err
    assert "nowhere" in said
    assert "Traceback" not in said


def test_the_command_starts_without_heavy_imports() -> None:
    """Neither the help nor the supervisor loads torch or transformers: they must start at once and stay small."""
    code = (
        "import sys, slos_serve.backend.cli, slos_serve.backend.launcher;"
        "sys.exit(bool({'torch', 'transformers', 'numba', 'numpy', 'tritonclient'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_command_is_installed() -> None:
    """`slos-serve` lies beside the interpreter that runs the tests."""
    command = Path(sys.executable).with_name("slos-serve")
    assert subprocess.run([command, "--help"], capture_output=True, check=False).returncode == 0
