"""The grammar benchmark: both languages hold the same texts where they overlap, and the last line
is JSON.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from experiments.bench import grammar


@pytest.mark.parametrize(
    "value", [{"a": 1}, {"a b": [1, "x", None], "c": {"d": -2.5}}, {"a": [True]}]
)
def test_the_regular_expression_is_json_of_two_levels(value):
    pattern = re.compile(grammar.json_pattern(2))
    assert pattern.fullmatch(json.dumps(value)) and pattern.fullmatch(
        json.dumps(value, separators=(",", ":"))
    )
    assert not pattern.fullmatch(json.dumps(value)[:-1]) and not pattern.fullmatch(
        json.dumps({"a": {"b": {"c": 1}}})
    )


@pytest.mark.slow
def test_the_last_line_is_json(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(sys, "argv", ["grammar", "--model", str(model), "--rounds", "2"])
    grammar.main()
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["name"] == "grammar" and last["ratios"].keys() == {"json", "regular"}
    assert all(ratio > 0 for ratio in last["ratios"].values())
