"""The benchmark of power sampling: its labels, its last line, and how it grows."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from experiments.bench import power


@pytest.mark.slow
def test_the_last_line_is_json(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    small = {"NUM": 2, "MAX_TOKENS": 8, "BLOCK": 4, "MOVES": 4, "ESS_TOKENS": 6, "ESS_STEPS": 12}
    for name, value in small.items():
        monkeypatch.setattr(power, name, value)
    monkeypatch.setattr(sys, "argv", ["power", "--model", str(model), "--rounds", "2"])
    power.main()
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    labels = {
        "throughput",
        "early_rejection",
        "ess_multiple_try",
        "ess_suffix_csmc",
        "ess_tempering",
    }
    assert last["name"] == "power" and last["ratios"].keys() == labels
    assert last["ratios"]["throughput"] > 0 and 0 <= last["ratios"]["early_rejection"] < 1


@pytest.mark.slow
def test_growth_is_drawn(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setattr(power, "CHAINS", (1, 2))
    monkeypatch.setattr(power, "HORIZONS", (4, 8))
    monkeypatch.setattr(power, "NUM", 2)
    out = tmp_path / "growth.png"
    arguments = ["power", "--model", str(model), "--rounds", "2", "--growth", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", arguments)
    power.main()
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["name"] == "power_growth" and last["ratios"].keys() == {"C1-T4", "C2-T4", "C2-T8"}
    assert out.stat().st_size > 10_000
