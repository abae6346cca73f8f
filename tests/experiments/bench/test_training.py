"""The training benchmark: its last line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from experiments.bench import training


@pytest.mark.slow
def test_the_last_line_is_json(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(sys, "argv", ["training", "--model", str(model), "--rounds", "2"])
    training.main()
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["name"] == "training" and last["ratios"].keys() == {"lora_step"}
    assert last["ratios"]["lora_step"] > 0
