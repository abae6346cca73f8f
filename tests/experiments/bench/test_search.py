"""The benchmark of best-first search: its labels, its last line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from experiments.bench import search


@pytest.mark.slow
def test_the_last_line_is_json(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(search, "MAX_TOKENS", 16)
    monkeypatch.setattr(sys, "argv", ["search", "--model", str(model), "--rounds", "2"])
    search.main()
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["name"] == "search_overhead"
    assert last["ratios"].keys() == {"greedy", "four_at_a_time"}
    assert all(ratio > 0 for ratio in last["ratios"].values())
