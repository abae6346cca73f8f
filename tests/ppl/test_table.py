"""Weighted strings as a table: duplicates merged, heaviest first, the dead left out."""

from __future__ import annotations

import dataclasses
import io
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import ppl
from ppl.table import merge


class Letters:
    def decode(self, ids: list[int]) -> str:
        return "".join("a.b\n"[v] for v in ids)


@dataclasses.dataclass
class Population:
    sequences: ppl.Sequences
    log_weights: Any
    log_z: Any = None


def population(log_weights: Any = (0.0, 1.0, -jnp.inf, 0.5, 0.0)) -> Population:
    """ "ab", "ab", dead, "ab" + cut by the horizon, "a<newline>"."""
    tokens = jnp.array([[0, 2, 1], [0, 2, 1], [2, 2, 1], [0, 2, 0], [0, 3, 1]], jnp.int32)
    return Population(
        ppl.Sequences(tokens, jnp.array([2, 2, 2, 3, 2])),
        jnp.array(log_weights),
        jnp.float32(-1.25),
    )


def shown(view: Any, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(view)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_duplicates_merge_and_weights_are_normalised():
    rows = merge(population(), Letters())
    total = np.exp([0.0, 1.0, 0.5, 0.0]).sum()
    assert [(text, copies, ended) for text, _, copies, ended in rows] == [
        ("ab", 2, True),
        ("aba", 1, False),
        ("a\n", 1, True),
    ]
    np.testing.assert_allclose(
        [w for _, w, _, _ in rows], np.array([1 + np.e, np.exp(0.5), 1.0]) / total, rtol=1e-6
    )


def test_an_ended_string_is_not_a_cut_one():
    """(a, b) with EOS within three tokens and (a, b, .) cut by the horizon read alike in part, and
    stay two rows.
    """
    tokens = jnp.array([[0, 2], [0, 1]], jnp.int32)
    rows = merge(Population(ppl.Sequences(tokens, jnp.array([2, 1])), jnp.zeros(2)), Letters())
    assert sorted((text, ended) for text, _, _, ended in rows) == [("a", True), ("ab", False)]


def test_what_is_shown():
    text = shown(ppl.table(population(), Letters()))
    lines = [line for line in text.splitlines() if "0." in line and "log Z" not in line]
    assert "ab" in lines[0] and " 2 " in lines[0] and "…" not in lines[0]
    assert "aba…" in lines[1]
    assert "a↵" in lines[2]
    assert "log Z = -1.250" in text
    assert "bb" not in text


def test_more_strings_than_rows():
    text = shown(ppl.table(population(), Letters(), top=1))
    assert "(2 more)" in text and "aba" not in text


def test_all_dead_is_said():
    assert "all particles are dead" in shown(
        ppl.table(population(jnp.full(5, -jnp.inf)), Letters())
    )


def test_one_population_at_a_time():
    several = Population(
        ppl.Sequences(jnp.zeros((2, 8, 4), jnp.int32), jnp.zeros((2, 8), jnp.int32)),
        jnp.zeros((2, 8)),
    )
    with pytest.raises(
        ValueError, match=r"expected one population with tokens \[N, T\], got \(2, 8, 4\); pick one"
    ):
        ppl.table(several, Letters())
