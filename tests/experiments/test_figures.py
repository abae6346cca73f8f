"""The genealogy that the figure draws: followed back from its end it spells the strings."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

import ppl
from experiments import decode, figures, saving
from experiments.saving import Run
from ppl.target import Target
from samplers import diagnostics
from tests import helpers


class Letters:
    """A tokenizer of the tabular models."""

    eos, vocab_size = helpers.EOS, helpers.VOCAB_SIZE
    token_bytes = (b"a", None, b"b", b"$")

    def decode(self, ids: object) -> str:
        return "".join("a.b$"[int(token)] for token in np.asarray(ids))


@pytest.fixture(scope="module")
def target() -> Target:
    return helpers.hmm().given(helpers.PROMPT, max_tokens=8) ** 2 * ppl.min_tokens(3)


@pytest.fixture(scope="module")
def run(target: Target) -> Run:
    config = saving.Config(prompt="a $prompt", num_particles=16, max_tokens=8, alpha=2.0)
    found = decode.decode(config, target, Letters())  # pyright: ignore[reportArgumentType]
    assert found.population.steps is not None and found.population.steps.resampled.sum() >= 1
    return found


def test_the_genealogy_spells_the_strings(run: Run):
    steps = run.population.steps
    assert steps is not None
    of_parent = figures.parents(steps)
    for slot, tokens in enumerate(np.asarray(run.population.sequences.tokens)):
        spelled, at = [], slot
        for t in range(len(of_parent) - 1, -1, -1):
            spelled.append(int(steps.history_tokens[t, at]))
            at = of_parent[t, at]
        assert spelled[::-1] == tokens.tolist()


def test_weights_flow_back_to_the_ancestors(run: Run):
    steps, weights = run.population.steps, run.population.weights
    assert steps is not None
    heavy, kept = figures.descendant_weights(steps, weights), figures.survivors(steps, weights > 0)
    np.testing.assert_allclose(heavy.sum(1), 1, atol=1e-5)
    assert (kept == (heavy > 0)).all()
    resampled = np.flatnonzero(steps.resampled)
    assert all(not kept[t].all() for t in resampled), "resampling leaves some without descendants"
    assert all(kept[t].sum() == len(set(steps.history_ancestors[t])) for t in resampled[-1:])


def test_heaviest_merges_equal_strings(run: Run):
    merged = figures.heaviest(run)
    assert len({text for text, _ in merged}) == len(merged)
    assert sum(weight for _, weight in merged) == pytest.approx(1, abs=1e-5)
    assert [weight for _, weight in merged] == sorted((weight for _, weight in merged), reverse=True)


def test_runs_of_equal_strings_share_a_label(run: Run):
    steps = run.population.steps
    assert steps is not None
    kept = np.ones_like(steps.history_tokens, bool)
    labels = [row for row in figures._runs(steps, kept) if row[0] == 0]
    changes = 1 + np.count_nonzero(np.diff(steps.history_tokens[0]))
    assert len(labels) == changes


def test_the_figure_renders(run: Run, tmp_path):
    figures.draw(run).savefig(tmp_path / "figure.png", dpi=50)
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_ess_and_weights_are_the_samplers(run: Run):
    log_weights = jnp.asarray(run.population.log_weights)
    assert run.population.ess == pytest.approx(float(diagnostics.ess(log_weights)), rel=1e-4)
    np.testing.assert_allclose(run.population.weights, diagnostics.normalise(log_weights), atol=1e-6)
