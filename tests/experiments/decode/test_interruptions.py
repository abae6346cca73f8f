"""The decode command when things go wrong: interrupts, dead populations, invalid potentials; and
rounds of text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ppl
from experiments.decode import __main__ as decode
from experiments.showing import saving
from experiments.showing.saving import Population
from tests import helpers

from .conftest import Command
from .test_decode import ARGUMENTS


def interrupted_after(steps: int) -> Callable[..., Iterator[Population]]:
    def method(key: jax.Array, target: Any, config: saving.Config, _: None) -> Iterator[Population]:
        for step, population in enumerate(decode.METHODS["smc"](key, target, config, None)):
            if step == steps:
                raise KeyboardInterrupt
            yield population

    return method


def test_an_interrupted_run_keeps_what_it_has(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(decode.METHODS, "importance", interrupted_after(2))
    status, out, _ = command(*ARGUMENTS, "--method", "importance", "--compare")
    run = saving.load(tmp_path / "out")
    assert (
        status == 130
        and "interrupted after token 2" in out
        and run.interrupted
        and run.comparison == {}
    )
    assert (
        run.population.sequences.tokens.shape == (12, 2)
        and (tmp_path / "out" / "figure.png").is_file()
    )


def test_an_interrupt_before_the_first_step_saves_nothing(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(decode.METHODS, "importance", interrupted_after(0))
    status, out, _ = command(*ARGUMENTS, "--method", "importance")
    assert (
        status == 130 and "interrupted" in out and not (tmp_path / "out" / saving.RESULTS).exists()
    )


def tilted(potential: ppl.Potential) -> Callable[..., Any]:
    """In place of `build_target`: a Markov chain, whose programs compile quickly."""
    return lambda config, *_: (
        helpers.markov().given(helpers.PROMPT, max_tokens=config.max_tokens) * potential
    )


@pytest.mark.slow
def test_rounds_are_steps_of_text(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(decode, "build_target", tilted(ppl.min_tokens(3)))
    arguments = [
        "--prompt",
        "hi",
        "--num-particles",
        "6",
        "--max-tokens",
        "6",
        "--steps-every",
        "4",
    ]
    status, out, _ = command(*arguments)
    run = saving.load(tmp_path / "out")
    assert (
        status == 0
        and run.population.history is not None
        and run.population.history.drawn.shape == (2, 6, 4)
    )
    assert re.search(r"^step +1  token +4/6 ", out, re.MULTILINE) and re.search(
        r"before \d of 2 steps", out
    )
    rows = zip(
        run.texts, run.population.sequences.tokens, run.population.sequences.length, strict=True
    )
    assert all(run.decode(tokens[:length]) == text for text, tokens, length in rows)


def test_a_dead_population_is_flagged_and_saved(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    impossible = ppl.reward(lambda tokens, length: jnp.full(length.shape, -jnp.inf))
    monkeypatch.setattr(decode, "build_target", tilted(impossible))
    status, out, _ = command("--prompt", "hi", "--num-particles", "4", "--max-tokens", "4")
    run = saving.load(tmp_path / "out")
    assert status == 0 and "All particles are dead" in out
    assert run.population.all_dead and run.population.log_z == -np.inf and run.population.ess == 0
    text = (tmp_path / "out" / saving.RESULTS).read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert (tmp_path / "out" / "figure.png").is_file()


def test_an_invalid_potential_is_counted(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def invalid(tokens: jax.Array, length: jax.Array) -> jax.Array:
        return jnp.where(jnp.arange(length.shape[0]) == 0, jnp.nan, 0.0)

    monkeypatch.setattr(decode, "build_target", tilted(ppl.reward(invalid)))
    status, out, _ = command("--prompt", "hi", "--num-particles", "4", "--max-tokens", "4")
    num_invalid = saving.load(tmp_path / "out").population.num_invalid
    assert status == 0 and num_invalid >= 1 and f"NaN or +inf {num_invalid} times" in out
