"""What a terminal shows of chains: the numbers of the run, while it runs and afterwards."""

from __future__ import annotations

import dataclasses
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from experiments.showing import chain_report
from samplers.base import Kernel
from samplers.mcmc import chains
from samplers.mcmc import diagnostics as chain_diagnostics
from samplers.results import Chains, moved


def shown(what: object) -> str:
    console = Console(file=io.StringIO(), width=140)
    console.print(what)
    return console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


def test_the_table_has_every_quantity_with_its_diagnostics(chain_run: Chains):
    text = shown(chain_report.table(chain_run))
    for name, x in (
        ("log p", chain_run.draws["log_prob"]),
        ("length", np.asarray(chain_run.draws["sequences"].length)),
    ):
        [line] = [line for line in text.splitlines() if line.startswith(f"│ {name}")]
        assert f"{x.mean():.4g}" in line and f"{chain_diagnostics.bulk_ess(x):.0f}" in line
        assert f"{chain_diagnostics.split_r_hat(x):.3f}" in line
    assert "4 chains, 60 draws, every 2 steps, after 5 steps, acceptance" in " ".join(text.split())
    assert "tokens" in text


def test_acceptance_is_of_the_moves_made(chain_run: Chains):
    made = np.asarray(chain_run.info.tokens) > 0
    assert 0 < made.mean() < 1
    rate = np.asarray(chain_run.info.accepted)[made].mean()
    assert chain_report.acceptance(chain_run) == pytest.approx(rate)
    assert chain_report.acceptance(dataclasses.replace(chain_run, info=None)) is None
    gibbs = dataclasses.replace(
        chain_run, info=moved(jnp.ones(made.shape, bool), changed=jnp.asarray(made))
    )
    assert f"acceptance 1.00, changed {made.mean():.2f}" in chain_report.title(gibbs)
    none = dataclasses.replace(chain_run.info, proposed=np.zeros_like(made))
    assert np.isnan(chain_report.acceptance(dataclasses.replace(chain_run, info=none)))  # pyright: ignore


def test_chains_that_do_not_move_are_named(chain_run: Chains):
    text = shown(
        chain_report.table({"log_prob": np.zeros((10, 3)), "x": np.tile(np.arange(3.0), (10, 1))})
    )
    assert "all draws are equal" in text and "constant in 3 of 3 chains" in text and "nan" in text
    with pytest.raises(ValueError, match="expected at least 4 draws"):
        chain_report.table({"x": np.zeros((3, 3))})


def test_the_bar_follows_the_run():
    console = Console(file=io.StringIO(), width=120, force_terminal=True)
    kernel = Kernel(lambda x: x, lambda key, x: (x + jax.random.normal(key, x.shape), None))
    collect = lambda x: {"log_prob": x}  # noqa: E731
    with chain_report.bar(console) as watch:
        out = chains.run(
            jax.random.key(0),
            kernel,
            jnp.zeros(3),
            num_samples=9,
            warmup=4,
            collect=collect,
            watch=watch,
        )
    text = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert "13/13" in text and "sampling" in text
    assert f"R-hat {chain_diagnostics.split_r_hat(out.draws['log_prob']):.3f}" in text
