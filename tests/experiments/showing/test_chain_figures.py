"""The pictures of chains draw the run's own numbers."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
from matplotlib.figure import Figure

from experiments.showing import chain_figures, chain_report
from ppl.ancestral import ancestral
from samplers.mcmc import chains, suffix
from samplers.mcmc import diagnostics as chain_diagnostics
from samplers.results import Chains
from tests import helpers
from tests.samplers.mcmc.test_diagnostics import ladder


def axes():
    return Figure(figsize=(6, 3)).subplots()


def test_every_chain_has_a_trace(chain_run: Chains):
    drawn = chain_figures.trace(chain_run.draws["log_prob"], "log p", axes=axes())
    for c, line in enumerate(drawn.lines):
        np.testing.assert_array_equal(line.get_ydata(), chain_run.draws["log_prob"][:, c])
        np.testing.assert_array_equal(line.get_xdata(), np.arange(1, 61))
    assert len(drawn.lines) == 4
    # Whole numbers have a bar each.
    side = chain_figures.trace(
        chain_run.draws["sequences"].length, "length", axes=axes()
    ).child_axes[0]
    lengths = np.asarray(chain_run.draws["sequences"].length)
    found = {bar.get_y() + 0.5: bar.get_width() for bar in side.patches}  # pyright: ignore
    assert all(found[value] == (lengths == value).sum() for value in np.unique(lengths))


def test_r_hat_ends_where_the_diagnostic_is(chain_run: Chains):
    drawn = chain_figures.r_hat(chain_run, axes=axes())
    for name, x in chain_diagnostics.quantities(chain_run.draws).items():
        [line] = [line for line in drawn.lines if line.get_label() == chain_report.label(name)]
        ends, values = np.asarray(line.get_data())
        assert ends[-1] == 60 and values[-1] == pytest.approx(chain_diagnostics.split_r_hat(x))
        assert values[3] == pytest.approx(
            chain_diagnostics.split_r_hat(x[: int(ends[3])]), nan_ok=True
        )


def test_r_hat_of_chains_that_never_moved_is_called_unknown(chain_run: Chains):
    still = dataclasses.replace(chain_run, draws={"log_prob": np.zeros((60, 4))})
    drawn = chain_figures.r_hat(still, axes=axes())
    assert any("unknown" in str(line.get_label()) for line in drawn.lines)


def test_acceptance_by_cut_is_the_diagnostics(chain_run: Chains):
    drawn = chain_figures.acceptance_by_cut(chain_run, axes=axes())
    info = chain_run.info
    rate, count = chain_diagnostics.acceptance_by_cut(
        info.accepted, info.details["cut"], 6, info.proposed
    )
    np.testing.assert_array_equal(drawn.containers[0][0].get_ydata(), rate)  # pyright: ignore
    behind = [other for other in drawn.figure.axes if other is not drawn][0]
    assert [bar.get_height() for bar in behind.patches] == count.tolist()  # pyright: ignore
    with pytest.raises(ValueError, match="expected a run whose info is a MoveInfo with `cut`"):
        chain_figures.acceptance_by_cut(dataclasses.replace(chain_run, info=None), axes=axes())


def test_replicas_are_drawn_on_their_rungs():
    rungs = ladder(np.array([0.5, 0.2]), 80)
    drawn = chain_figures.replicas(rungs, chain=1, most=30, names=["1", "2", "4"], axes=axes())
    for k, line in enumerate(drawn.lines):
        np.testing.assert_array_equal(line.get_ydata(), rungs[-30:, 1, k])
    assert (
        f"{chain_diagnostics.round_trips(rungs).sum()} round trips in 3 chains"
        in drawn.get_title(loc="left")
    )
    swaps = [f" {rate:.2f}" for rate in chain_diagnostics.swap_acceptance(rungs)]
    assert [text.get_text() for text in drawn.texts] == swaps
    assert [label.get_text() for label in drawn.get_yticklabels()] == ["1", "2", "4"]


@pytest.mark.slow
def test_a_real_run_is_drawn_and_tabled(tmp_path: Path):
    p = helpers.hmm().given(helpers.PROMPT, max_tokens=6)
    start = ancestral(jax.random.key(1), p, 4)
    out = chains.run(
        jax.random.key(0), suffix.kernel(p**1.5), start, num_samples=60, thin=2, warmup=5
    )
    chain_figures.draw(out).savefig(tmp_path / "figure.png", dpi=40)
    assert chain_report.table(out).row_count == 2 and 0 < (chain_report.acceptance(out) or 0) < 1


def test_the_figure_renders(chain_run: Chains, tmp_path: Path):
    rungs = ladder(np.array([0.5, 0.2]), 59)
    figure = chain_figures.draw(
        dataclasses.replace(chain_run, draws={**chain_run.draws, "rung": rungs})
    )
    figure.savefig(tmp_path / "figure.png", dpi=40)
    assert (tmp_path / "figure.png").stat().st_size > 5000
    # Two traces, R-hat, acceptance and how many moves there were, replicas; without cuts or rungs
    # only three.
    assert [
        len(figure.axes),
        len(chain_figures.draw(dataclasses.replace(chain_run, info=None)).axes),
    ] == [6, 3]
