"""Ratios are taken within a repetition, and every label has its turn."""

from __future__ import annotations

import json
from typing import Any

import jax
import pytest

from experiments.bench import turns


def test_ratios_are_taken_within_a_repetition():
    times = {"plain": [1.0, 10.0, 2.0], "ours": [1.1, 12.0, 2.0]}
    assert turns.ratios(times) == {"ours": [1.1, 1.2, 1.0]}


def test_all_take_turns_with_the_same_keys():
    seen: list[tuple[str, int]] = []

    def run(label: str, key: Any) -> Any:
        seen.append((label, int(jax.random.key_data(key)[-1])))
        return key

    of = {label: lambda key, label=label: run(label, key) for label in "ab"}
    times = turns.measure(of, 2, lambda out: 4)
    assert seen == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("b", 2), ("a", 2)]
    assert {label: len(row) for label, row in times.items()} == {"a": 2, "b": 2}


def test_the_last_line_is_json(capsys: pytest.CaptureFixture[str]):
    turns.report("it", {"plain": [1.0, 2.0], "ours": [1.5, 3.0]}, "title")
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["name"] == "it" and last["ratios"] == {"ours": 1.5} and last["device"]
