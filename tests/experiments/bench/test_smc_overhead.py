"""The overhead benchmark: its labels, its last line, and how it grows."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from experiments.bench import smc_overhead


@pytest.mark.slow
def test_the_last_line_is_json(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(sys, "argv", ["smc_overhead", "--model", str(model), "--rounds", "2"])
    smc_overhead.main()
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    labels = {"regex", "resample_always", "process_reward", "plain_smc"}
    assert last["name"] == "smc_overhead" and last["ratios"].keys() == labels
    assert all(ratio > 0 for ratio in last["ratios"].values())


@pytest.mark.slow
def test_growth_is_drawn(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setattr(smc_overhead, "SIZES", (1, 2))
    monkeypatch.setattr(smc_overhead, "HORIZONS", (4, 8))
    monkeypatch.setattr(smc_overhead, "NUM", 2)
    out = tmp_path / "growth.png"
    arguments = [
        "smc_overhead",
        "--model",
        str(model),
        "--rounds",
        "2",
        "--growth",
        "--out",
        str(out),
    ]
    monkeypatch.setattr(sys, "argv", arguments)
    smc_overhead.main()
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["name"] == "smc_growth" and last["ratios"].keys() == {"N1-T4", "N2-T4", "N2-T8"}
    assert out.stat().st_size > 10_000
