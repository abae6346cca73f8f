"""Chains as ArviZ sees them: the same numbers, with chains first."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

from experiments.showing import arviz_export
from ppl.sequences import Sequences
from samplers import base
from samplers.latent import blocks, posterior
from samplers.mcmc import chains
from samplers.mcmc import diagnostics as chain_diagnostics
from samplers.results import Chains

from ..letters import Letters


def test_groups_have_chains_first(chain_run: Chains):
    found = arviz_export.groups(chain_run, Letters())
    posterior, stats = found["posterior"], found["sample_stats"]
    assert posterior.keys() == {"log_prob", "length"}
    np.testing.assert_array_equal(posterior["log_prob"][2], chain_run.draws["log_prob"][:, 2])
    assert stats["token_ids"].shape == (4, 60, 6) and stats["text"].shape == (4, 60)
    tokens, length = stats["token_ids"][1, 7], int(posterior["length"][1, 7])
    assert stats["text"][1, 7] == Letters().decode(tokens[:length])
    np.testing.assert_allclose(stats["accepted"][3, 5], chain_run.info.accepted[5, :, 3].mean())
    assert "text" not in arviz_export.groups(chain_run)["sample_stats"]


def skewed(counts: Any) -> None:
    """Latents that are positive, and a simplex."""
    rate = numpyro.sample("rate", dist.Gamma(2.0, 1.0))
    shares = numpyro.sample("shares", dist.Dirichlet(jnp.array([1.0, 2.0, 3.0])))
    numpyro.deterministic("first", rate * shares[0])
    numpyro.sample("counts", dist.Poisson(rate), obs=counts)


def check_sites(out: Chains) -> None:
    """Under the model's names, in the supports of the sites, chains first."""
    found = arviz_export.groups(out)["posterior"]
    assert {"rate", "shares", "first"} <= found.keys() and "position" not in found
    assert found["rate"].shape == (2, 5) and (found["rate"] > 0).all()
    assert found["shares"].shape == (2, 5, 3)
    np.testing.assert_allclose(found["shares"].sum(-1), 1, rtol=1e-5)
    np.testing.assert_allclose(found["first"], found["rate"] * found["shares"][..., 0], rtol=1e-5)
    names = [row.name for row in chain_diagnostics.summary(chain_diagnostics.quantities(out.draws))]
    assert {"rate", "first", "shares[0]", "shares[2]"} <= set(names)


def test_chains_of_a_model_have_its_sites():
    """Walks over R^D, of which `posterior.named` says what they stand for."""
    of = posterior.density(skewed, jnp.array([3.0, 1.0]))
    start = jax.vmap(of.sample_prior)(jax.random.split(jax.random.key(0), 2))

    def step(key: Any, x: Any) -> Any:
        return x + 0.1 * jax.random.normal(key, x.shape), None

    kernel = base.Kernel(lambda x: x, step)
    out = chains.run(
        jax.random.key(1), kernel, start, num_samples=5, collect=lambda x: {"position": x}
    )
    named = posterior.named(of, out)
    check_sites(named)
    rate = jnp.exp(out.draws["position"][:, :, 0])
    np.testing.assert_allclose(named.draws["latents"]["rate"], rate, rtol=1e-5)
    with pytest.raises(ValueError, match="expected draws with `position`"):
        posterior.named(of, named)


def test_latents_beside_a_text_are_kept_by_name():
    """What `blocks` carries: `chains.collected` keeps it, and the tables and ArviZ show it."""
    x = Sequences(jnp.full((2, 3), 1, jnp.int32), jnp.zeros(2, jnp.int32))
    latents = {"rate": jnp.ones(2), "shares": jnp.full((2, 3), 1 / 3), "first": jnp.ones(2) / 3}
    state = blocks.State(jnp.zeros((2, 3)), x, latents)
    kept = chains.collected(state)
    assert {"sequences", "latents", "position"} == kept.keys()
    draws = jax.tree.map(lambda leaf: np.broadcast_to(leaf, (5, *leaf.shape)), kept)
    check_sites(Chains(draws=draws, info=None, state=state, cost=None, steps=5))


def test_the_extra_is_named_where_it_is_missing(chain_run: Chains, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "arviz", None)
    with pytest.raises(ImportError, match=r"pip install 'tiltlm\[arviz\]'"):
        arviz_export.to_arviz(chain_run)


def test_older_versions_take_the_groups_by_name(chain_run: Chains, monkeypatch: pytest.MonkeyPatch):
    """What ArviZ 0 is called with: posterior and statistics beside each other, chains first."""

    class Older:
        """ArviZ 0, as far as it matters."""

        class InferenceData: ...

        @staticmethod
        def from_dict(posterior: Any, *, sample_stats: Any, dims: dict[str, list[str]]) -> Any:
            return posterior, sample_stats, dims

    monkeypatch.setitem(sys.modules, "arviz", Older())
    posterior, stats, dims = arviz_export.to_arviz(chain_run, Letters())
    assert {x.shape for x in posterior.values()} == {(4, 60)}
    np.testing.assert_array_equal(posterior["log_prob"].T, chain_run.draws["log_prob"])
    assert stats["token_ids"].shape == (4, 60, 6) and dims == {"token_ids": ["token"]}


def test_version_one_takes_the_groups_as_one_dictionary(
    chain_run: Chains, monkeypatch: pytest.MonkeyPatch
):
    class One:
        """ArviZ 1, as far as it matters."""

        InferenceData = None

        @staticmethod
        def from_dict(data: dict[str, Any], *, dims: dict[str, list[str]]) -> Any:
            return data, dims

    monkeypatch.setitem(sys.modules, "arviz", One())
    data, dims = arviz_export.to_arviz(chain_run)
    assert data.keys() == {"posterior", "sample_stats"} and dims == {"token_ids": ["token"]}


@pytest.mark.slow
def test_arviz_finds_what_we_find(chain_run: Chains, tmp_path):
    import arviz  # of the dev extra: a slow lane without it fails

    found = arviz_export.to_arviz(chain_run, Letters())
    assert dict(found["posterior"]["log_prob"].sizes) == {"chain": 4, "draw": 60}
    assert found["sample_stats"]["token_ids"].dims == ("chain", "draw", "token")
    x = chain_run.draws["log_prob"]
    assert float(arviz.ess(found["posterior"]["log_prob"].values, method="bulk")) == pytest.approx(
        chain_diagnostics.bulk_ess(x), rel=0.02
    )
    assert set(arviz.summary(found).index) == {"log_prob", "length"}


def test_a_run_without_draws_is_refused(chain_run: Chains, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "arviz", type("arviz", (), {}))
    none = dataclasses.replace(chain_run, draws={}, info=None, steps=0)
    with pytest.raises(ValueError, match="expected a run with draws, got one without"):
        arviz_export.to_arviz(none)
