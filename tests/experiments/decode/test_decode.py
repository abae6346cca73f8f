"""The decode command: its results are the samplers', saved, reloaded and repeated; wrong input is
one line.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
import ppl
from experiments.decode import __main__ as decode
from experiments.showing import saving
from experiments.showing.saving import Run
from samplers import smc
from samplers.results import Weighted
from samplers.smc import importance

from .. import tiny
from .conftest import Command

PATTERN = "[ab]+(c|de)[0-9]?"
ARGUMENTS = [
    "--prompt",
    "hi",
    "--regex",
    PATTERN,
    "--num-particles",
    "12",
    "--max-tokens",
    "6",
    "--alpha",
    "2",
]


@pytest.fixture(scope="module")
def saved(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One finished run with a comparison."""
    out = tmp_path_factory.mktemp("run")
    assert decode.main(["--model", str(model), "--out", str(out), *ARGUMENTS, "--compare"]) == 0
    return out


def target_of(run: Run) -> tuple[Any, Any]:
    lm, tokenizer = models.load(run.config.model)
    return decode.build_target(run.config, lm, tokenizer), tokenizer


def test_the_result_is_that_of_smc(saved: Path):
    run = saving.load(saved)
    target, _ = target_of(run)
    expected = smc.run(jax.random.key(0), target, num_particles=12)
    used = run.population.sequences.tokens.shape[1]
    np.testing.assert_array_equal(
        run.population.sequences.tokens, expected.sequences.tokens[:, :used]
    )
    assert (expected.sequences.tokens[:, used:] == target.lm.eos).all()
    np.testing.assert_allclose(run.population.log_weights, expected.log_weights, atol=1e-4)
    assert run.population.log_z == pytest.approx(float(expected.log_z), abs=1e-4)
    assert run.population.log_z_std_error == pytest.approx(
        float(expected.log_z_std_error), abs=1e-4
    )
    assert run.population.cost["tokens"] == int(expected.cost.tokens)


def test_the_strings_match_and_the_target_is_the_one_asked_for(saved: Path):
    run = saving.load(saved)
    assert all(
        re.fullmatch(PATTERN, text)
        for text, w in zip(run.texts, run.population.weights, strict=True)
        if w > 0
    )
    target, tokenizer = target_of(run)
    lm = target.lm
    by_hand = lm.given(tokenizer.chat("hi"), max_tokens=6) ** 2 * ppl.regex(PATTERN, tokenizer)
    row = jnp.array([[*tokenizer.encode("abc"), *[lm.eos] * 3]], jnp.int32)
    assert float(target.log_density(row, jnp.array([3]))[0]) == pytest.approx(
        float(by_hand.log_density(row, jnp.array([3]))[0])
    )


def test_what_is_saved_is_what_was_computed(saved: Path, tmp_path: Path):
    run = saving.load(saved)
    assert run.key == [0, 0] and run.config.alpha == 2 and not run.interrupted
    assert {"python", "jax", "tiltlm"} <= run.versions.keys() and run.device.startswith(
        jax.devices()[0].platform
    )
    assert np.isclose(run.population.weights.sum(), 1)
    assert (saved / "figure.png").read_bytes().startswith(b"\x89PNG")
    saving.save(run, tmp_path)
    assert_equal(saving.load(tmp_path), run)


def test_a_second_run_gives_the_same(saved: Path, command: Command, tmp_path: Path):
    status, _, _ = command(*ARGUMENTS, "--compare")
    assert status == 0
    again, first = saving.load(tmp_path / "out"), saving.load(saved)
    assert_equal(dataclasses.replace(again, seconds=first.seconds), first)


def test_another_seed_gives_another_result(saved: Path, command: Command, tmp_path: Path):
    command(*ARGUMENTS, "--seed", "1")
    assert saving.load(tmp_path / "out").population.log_z != saving.load(saved).population.log_z


def assert_equal(a: Run, b: Run) -> None:
    for x, y in zip(jax.tree.leaves(as_tree(a)), jax.tree.leaves(as_tree(b)), strict=True):
        np.testing.assert_array_equal(x, y)


def as_tree(run: Run) -> dict[str, Any]:
    """All that a run holds, as nested dictionaries."""
    return dataclasses.asdict(run)


def test_the_comparison_shows_unweighted_draws(saved: Path):
    run = saving.load(saved)
    target, tokenizer = target_of(run)
    masked_key, _ = jax.random.split(
        jax.random.fold_in(jax.random.key(0), 1)
    )  # not the run's own key
    drawn = importance.run(masked_key, target, num_particles=12).sequences
    texts = [tokenizer.decode(row[:n]) for row, n in zip(drawn.tokens, drawn.length, strict=True)]
    masked = dict(run.comparison["masked"])
    assert masked == pytest.approx({text: texts.count(text) / 12 for text in texts})
    alone = [text for text, _ in run.comparison["model alone"]]
    assert not all(re.fullmatch(PATTERN, text) for text in alone)


def test_importance_never_resamples(command: Command, tmp_path: Path):
    status, _, _ = command(*ARGUMENTS, "--method", "importance")
    run = saving.load(tmp_path / "out")
    assert (
        status == 0
        and run.population.trace is not None
        and not run.population.trace.resampled.any()
    )


def test_ancestral_draws_are_equally_weighted(command: Command, tmp_path: Path):
    status, _, _ = command(
        "--prompt", "hi", "--num-particles", "4", "--max-tokens", "5", "--method", "ancestral"
    )
    run = saving.load(tmp_path / "out")
    assert (
        status == 0 and run.population.log_z == 0 and run.population.weights.tolist() == [0.25] * 4
    )
    assert (tmp_path / "out" / "figure.png").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["power-mh", "tempering"])
def test_chains_are_equally_weighted_and_live_in_the_support(
    command: Command, tmp_path: Path, method: str
):
    arguments = ["--method", method, "--moves-per-block", "4", "--block-size", "3"]
    assert command(*ARGUMENTS, *arguments)[0] == 0
    run = saving.load(tmp_path / "out")
    alive = run.population.weights > 0
    assert alive.any() and run.population.log_z is None and run.population.cost["tokens"] > 12
    assert all(
        re.fullmatch(PATTERN, text) for text, lives in zip(run.texts, alive, strict=True) if lives
    )


@pytest.mark.slow
def test_power_smc_estimates_the_same_evidence(saved: Path, command: Command, tmp_path: Path):
    assert command(*ARGUMENTS, "--method", "power-smc")[0] == 0
    found, expected = saving.load(tmp_path / "out").population, saving.load(saved).population
    assert found.log_z != expected.log_z and found.log_z == pytest.approx(expected.log_z, abs=1.0)


def test_best_of_n_returns_a_choice_without_evidence(command: Command, tmp_path: Path):
    arguments = [
        "--prompt",
        "hi",
        "--num-particles",
        "4",
        "--max-tokens",
        "5",
        "--method",
        "best-of-n",
    ]
    status, out, _ = command(*arguments, "--regex", ".*[a-m].*")
    run = saving.load(tmp_path / "out")
    assert status == 0 and "log Z" not in out and np.count_nonzero(run.population.weights) == 1
    [chosen] = [
        text for text, weight in zip(run.texts, run.population.weights, strict=True) if weight > 0
    ]
    assert re.search("[a-m]", chosen) and (tmp_path / "out" / "figure.png").is_file()


@pytest.mark.slow
def test_json_schema(command: Command, tmp_path: Path):
    (tmp_path / "schema.json").write_text(
        '{"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}'
    )
    arguments = ["--prompt", "hi", "--num-particles", "4", "--max-tokens", "24"]
    status, _, _ = command(*arguments, "--json-schema", str(tmp_path / "schema.json"))
    run = saving.load(tmp_path / "out")
    assert status == 0 and run.config.json_schema["required"] == ["a"]
    assert all(isinstance(json.loads(text)["a"], bool) for text in run.texts)


def test_output_is_plain_lines_without_a_terminal(command: Command):
    _, out, _ = command(*ARGUMENTS)
    assert "\x1b" not in out and re.search(r"^token +1/6 .*ESS.*log Z", out, re.MULTILINE)
    for part in ("log Z", "ESS", "tokens in", "compilation", "saved in"):
        assert part in out


WRONG = {
    "an invalid regex": (["--regex", "(a"], "expected a regular expression"),
    "a regex that nothing matches": (["--regex", "é"], "expected a pattern"),
    "a regex that needs more tokens": (
        ["--regex", "a{9}", "--max-tokens", "4"],
        "raise max_tokens",
    ),
    "no particles": (["--num-particles", "0"], "num_particles"),
    "no tokens": (["--max-tokens", "0"], "max_tokens"),
    "beyond the context": (["--max-tokens", "300"], "context"),
    "an unknown model": (["--model", "no-such-model"], "registered name"),
    "a schema that does not exist": (["--json-schema", "nowhere.json"], "nowhere.json"),
    "alpha 0": (["--alpha", "0"], "--alpha above 0"),
    "alpha nan": (["--alpha", "nan"], "--alpha above 0"),
    "steps of no token": (["--steps-every", "0"], "every"),
    "a delimiter that no token holds": (
        ["--step-delimiter", "é"],
        "--step-delimiter: expected delimiters that this vocabulary can write",
    ),
    "steps of a method without any": (
        ["--method", "ancestral", "--steps-every", "2"],
        "--method smc",
    ),
    "ancestral of a tilted target": (
        ["--method", "ancestral", "--alpha", "2"],
        "plain language model",
    ),
}


@pytest.mark.bad_input
@pytest.mark.parametrize("what", WRONG)
def test_wrong_input_is_one_clear_line(command: Command, what: str):
    arguments, message = WRONG[what]
    status, out, err = command("--prompt", "hi", *arguments)
    assert (status, out) == (2, "")
    assert (
        err.startswith("error: ")
        and err.count("\n") == 1
        and message in err
        and "Traceback" not in err
    )


def test_a_damaged_schema_names_its_file(command: Command, tmp_path: Path):
    (tmp_path / "schema.json").write_text("{")
    status, _, err = command("--prompt", "hi", "--json-schema", str(tmp_path / "schema.json"))
    assert status == 2 and "schema.json: expected a JSON schema" in err


def test_a_base_model_gets_the_prompt_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    base = tiny.write(tmp_path / "base", chat=False)
    lm, tokenizer = models.load(base)
    config = saving.Config(prompt="hi there", num_particles=2, max_tokens=4)
    prefix = decode.build_target(config, lm, tokenizer).prefix
    assert tokenizer.decode(prefix.tokens[: int(prefix.length)]) == "hi there"
    status = decode.main(
        ["--model", str(base), "--prompt", "hi", "--system", "be", "--out", str(tmp_path / "out")]
    )
    assert status == 2 and "chat template" in capsys.readouterr().err


def test_an_output_that_is_a_file_is_refused_before_any_work(command: Command, tmp_path: Path):
    (tmp_path / "file").touch()
    status, _, err = command("--prompt", "hi", out=tmp_path / "file")
    assert status == 2 and "file" in err


def test_steps_end_at_a_delimiter(model: Path):
    _, tokenizer = models.load(model)
    steps = decode.build_steps(saving.Config(prompt="", step_delimiter="b"), tokenizer)
    newline = decode.build_steps(saving.Config(prompt="", step_delimiter="\\n"), tokenizer)
    assert steps is not None and newline is not None
    for found, text in ((steps, "b"), (newline, "\n")):
        assert found.table is not None
        ends = np.flatnonzero(np.asarray(found.table)[0] % 2)
        assert [tokenizer.decode([int(token)]) for token in ends] == [text]


def test_growing_strings_are_told_from_ended_ones(rounds: list[Weighted]):
    """Rounds are ragged where steps end at a delimiter, so the length alone does not tell."""
    mixed = 0
    for out in rounds:
        p, active = saving.population(out), int(out.trace.active[int(out.rounds) - 1])
        growing = ~p.ended & (np.asarray(out.sequences.length) < 10) & ~np.isneginf(p.log_weights)
        assert growing.sum() == active
        mixed += 0 < active < 16 and bool(
            (np.asarray(p.sequences.length)[growing] < p.sequences.tokens.shape[1]).any()
        )
    assert mixed, "in some round a growing string was shorter than another"
