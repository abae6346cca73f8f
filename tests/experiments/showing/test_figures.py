"""The pictures of a run: what they draw is the run's own genealogy, weights and trace."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch

import ppl
from experiments.decode import __main__ as decode
from experiments.showing import figures, lineages, saving
from experiments.showing.saving import Run
from ppl.target import Target
from samplers import diagnostics
from samplers.results import Choice, Weighted
from tests import helpers

from ..letters import Letters


@pytest.fixture(scope="module")
def target() -> Target:
    return helpers.hmm().given(helpers.PROMPT, max_tokens=8) ** 2 * ppl.min_tokens(3)


@pytest.fixture(scope="module")
def run(target: Target) -> Run:
    config = saving.Config(prompt="a $prompt", num_particles=16, max_tokens=8, alpha=2.0)
    found = decode.decode(config, target, Letters())  # pyright: ignore[reportArgumentType]
    assert found.population.trace is not None and found.population.trace.resampled.sum() >= 1
    return found


@pytest.fixture(scope="module")
def stepwise(rounds: list[Weighted]) -> Weighted:
    """Rounds of several tokens, some of them of none, and dead particles."""
    out = rounds[-1]
    assert (
        out.history is not None
        and np.isneginf(out.history.log_weights).any()
        and (out.history.drawn == -1).any()
    )
    return out


def axes():
    return Figure(figsize=(11, 4)).subplots()


def test_the_genealogy_spells_the_strings(stepwise: Weighted):
    p = saving.population(stepwise)
    assert p.history is not None
    slots = lineages.ancestry(np.asarray(p.history.ancestors))
    for i, tokens in enumerate(np.asarray(p.sequences.tokens)):
        drawn = np.concatenate([p.history.drawn[r, slots[r, i]] for r in range(len(slots))])
        spelled = drawn[drawn >= 0]
        length = int(p.sequences.length[i])
        assert spelled[:length].tolist() == tokens[:length].tolist()
        assert spelled[length:].tolist() == [helpers.EOS] * bool(p.ended[i])


def test_every_particle_of_every_round_is_one_line_from_its_ancestor(stepwise: Weighted):
    drawn = figures.genealogy(stepwise, Letters(), axes=axes())
    assert stepwise.history is not None
    ancestors = np.asarray(stepwise.history.ancestors)[: int(stepwise.rounds)]
    curves = [patch.get_path().vertices for patch in drawn.patches if isinstance(patch, PathPatch)]
    ends = {
        (round(c[-1][0]) - 1, round(c[-1][1])): (c[0][0], round(c[0][1]))
        for c in np.asarray(curves)
    }
    assert len(curves) == len(ends) == ancestors.size
    assert all(
        parent == ancestors[r, i] and x == (r or 0.5) for (r, i), (x, parent) in ends.items()
    )
    dead = np.isneginf(np.asarray(stepwise.history.log_weights)[: len(ancestors)])
    crosses = [
        np.asarray(c.get_offsets())
        for c in drawn.collections
        if len(np.asarray(c.get_offsets())) == dead.sum()
    ]
    assert {tuple(row) for row in crosses[0]} == {(r + 1, i) for r, i in np.argwhere(dead)}


@pytest.mark.slow
def test_resampling_is_marked_before_the_round_that_it_opened(run: Run):
    drawn, trace = figures.genealogy(run.population, run, axes=axes()), run.population.trace
    assert trace is not None
    marks = [np.asarray(line.get_xdata())[0] for line in drawn.lines]
    assert marks == (np.flatnonzero(trace.resampled) + 0.5).tolist()


def test_traces_are_the_samplers(run: Run):
    trace = run.population.trace
    assert trace is not None
    for curve, values in ((figures.ess, trace.ess), (figures.log_z, trace.log_z)):
        drawn = curve(run.population, axes=axes())
        assert any(np.array_equal(line.get_ydata(), values) for line in drawn.lines)


def test_weights_are_normalised_in_every_round(run: Run):
    drawn = figures.weights(run.population, run, axes=axes())
    lines = [np.asarray(line.get_data()) for line in drawn.lines]
    # Resampling is marked by lines too: those do not end on a round.
    ends = [line[:, -1].tolist() for line in lines if float(line[0, -1]).is_integer()]
    assert run.population.trace is not None
    for r in range(1, len(run.population.trace.ess) + 1):
        shares = [y for x, y in ends if x == r]
        # What is dead has a gap in its line.
        assert len(shares) == 16 and np.nansum(shares) == pytest.approx(1, abs=1e-3)


def test_heaviest_strings_are_drawn_with_their_total_weight(run: Run):
    drawn = figures.strings(run.population, run, axes=axes())
    merged = lineages.merged(run.texts, run.population.weights)
    assert sum(weight for _, weight in merged) == pytest.approx(1, abs=1e-5)
    assert [bar.get_width() for bar in drawn.patches] == pytest.approx(
        [w for _, w in merged[: figures.TOP]]
    )  # pyright: ignore


def test_the_figure_renders(run: Run, tmp_path):
    figures.draw(run).savefig(tmp_path / "figure.png", dpi=50)
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_a_notebook_gets_axes_of_its_own(stepwise: Weighted):
    from matplotlib import pyplot

    for drawn in (figures.genealogy(stepwise, Letters()), figures.ess(stepwise)):
        assert drawn.figure.number in pyplot.get_fignums()  # pyright: ignore[reportAttributeAccessIssue]
        pyplot.close(drawn.figure)  # pyright: ignore[reportArgumentType]


def test_a_pinned_particle_is_marked(stepwise: Weighted):
    drawn = figures.genealogy(stepwise, Letters(), pinned=-1, axes=axes())
    [squares] = [line for line in drawn.lines if line.get_label() == "pinned"]
    assert set(np.asarray(squares.get_ydata())) == {15}


def test_the_result_of_a_published_preset_has_a_genealogy_but_no_trace(stepwise: Weighted):
    names = ("log_weights", "num_invalid", "rounds", "history")
    out = Choice(
        samples=stepwise.samples,
        scores=stepwise.log_weights,
        best=jnp.int32(0),
        cost=stepwise.cost,
        details={name: getattr(stepwise, name) for name in names},
    )
    assert figures.genealogy(out, Letters(), axes=axes()).patches
    with pytest.raises(ValueError, match="expected a run with a trace"):
        figures.ess(out)


def test_what_cannot_be_drawn_is_refused(stepwise: Weighted):
    with pytest.raises(ValueError, match="run it with history=True"):
        figures.genealogy(dataclasses.replace(stepwise, history=None), Letters())
    with pytest.raises(ValueError, match="expected one population"):
        figures.ess(jax.tree.map(lambda leaf: leaf[None], stepwise))


def test_ess_and_weights_are_the_samplers(run: Run):
    log_weights = jnp.asarray(run.population.log_weights)
    assert run.population.ess == pytest.approx(float(diagnostics.ess(log_weights)), rel=1e-4)
    np.testing.assert_allclose(
        run.population.weights, diagnostics.normalise(log_weights), atol=1e-6
    )
