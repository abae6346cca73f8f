"""Weighted strings as a table: duplicates merged, heaviest first, the dead left out."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import ppl
from ppl.table import Row, merge, texts
from ppl.table.__main__ import main


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


def test_texts_are_rows_with_their_weights():
    """In the result's order, duplicates and the dead included; weights of the living sum to one."""
    rows = texts(population(), Letters())
    assert [row.text for row in rows] == ["ab", "ab", "bb", "aba", "a\n"]
    weights = np.exp([0.0, 1.0, -np.inf, 0.5, 0.0])
    np.testing.assert_allclose([row.weight for row in rows], weights / weights.sum(), rtol=1e-6)
    merged = {text: weight for text, weight, _, _ in merge(population(), Letters())}
    np.testing.assert_allclose(rows[0].weight + rows[1].weight, merged["ab"], rtol=1e-6)
    dead = texts(population(jnp.full(5, -jnp.inf)), Letters())
    assert dead[0] == Row("ab", 0.0) and sum(row.weight for row in dead) == 0


def test_texts_of_a_choice_and_of_chains():
    p = population()
    choice = dataclasses.make_dataclass("Pool", ["sequences", "scores"])(p.sequences, np.arange(5))
    assert texts(choice, Letters())[3] == Row("aba", 3.0)
    drawn = ppl.Sequences(
        jnp.stack([p.sequences.tokens, p.sequences.tokens[::-1]]),
        jnp.stack([p.sequences.length, p.sequences.length[::-1]]),
    )
    chains = dataclasses.make_dataclass("Run", ["draws"])
    rows = texts(chains({"sequences": drawn}), Letters())
    assert [row.text for row in rows[:5]] == [row.text for row in rows[:4:-1]]
    assert len(rows) == 10 and rows[7] == Row("bb", 0.1)
    with pytest.raises(ValueError, match=r"expected draws with `sequences`, got \['x'\]"):
        texts(chains({"x": np.zeros((4, 2))}), Letters())
    several = Population(
        ppl.Sequences(jnp.zeros((2, 8, 4), jnp.int32), jnp.zeros((2, 8), jnp.int32)),
        jnp.zeros((2, 8)),
    )
    with pytest.raises(
        ValueError, match=r"expected one result .* got \(2, 8, 4\); pick one prompt"
    ):
        texts(several, Letters())


def test_print_shows_the_table_and_repr_is_short():
    view = ppl.table(population(), Letters())
    assert "█" in str(view) and "aba…" in str(view) and "log Z = -1.250" in str(view)
    assert "\x1b" not in str(view) and repr(view) == str(view)
    tokens = jnp.zeros((9, 3000), jnp.int32)
    long = Population(ppl.Sequences(tokens, jnp.arange(2900, 2909, dtype=jnp.int32)), jnp.zeros(9))
    assert len(repr(ppl.table(long, Letters()))) < 2000 < len(str(ppl.table(long, Letters())))


def test_a_saved_run_is_shown_as_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """`python -m ppl.table`, over what `experiments.showing.saving` writes."""
    p = population()
    tokens, length = np.asarray(p.sequences.tokens), np.asarray(p.sequences.length)
    np.savez(
        tmp_path / "arrays.npz", tokens=tokens, length=length, log_weights=np.asarray(p.log_weights)
    )
    rows = [{"text": row.text} for row in texts(p, Letters())]
    (tmp_path / "results.json").write_text(json.dumps({"log_z": -1.25, "strings": rows}))
    assert main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.rstrip() == str(ppl.table(p, Letters()))
    assert main([str(tmp_path / "none")]) == 2
    assert "expected a saved run" in capsys.readouterr().err
