"""The decode command on a tiny model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from experiments.decode import __main__ as decode

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs the command on the tiny model; returns (exit status, stdout, stderr)."""

    def run(*arguments: str, out: Path = tmp_path / "out") -> tuple[int, str, str]:
        status = decode.main(["--model", str(model), "--out", str(out), *arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run
