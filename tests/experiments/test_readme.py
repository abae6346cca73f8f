"""The README's ten lines, run as a script."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import models

from . import tiny

README = (Path(__file__).parents[2] / "README.md").read_text()


@pytest.mark.slow
def test_the_ten_lines_show_something(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """With another model, for its time."""
    (lines,) = re.findall(r"## In ten lines\n\n```python\n(.*?)```", README, re.DOTALL)
    directory, load = tiny.write(tmp_path / "model"), models.load
    monkeypatch.setattr(models, "load", lambda name: load(directory))
    exec(compile(lines, "README", "exec"), {})
    shown = capsys.readouterr().out
    assert "weight" in shown and "█" in shown and "log Z = " in shown
    assert len(lines.strip().splitlines()) <= 12 and shown.count("\n") > 6
