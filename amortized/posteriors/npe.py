"""Neural posterior estimation: q(theta | x) by maximum likelihood on simulations of a NumPyro model
(Papamakarios and Murray 2016, arXiv 1605.06376).

    training = npe.training(key, model, latents=["theta"], observed=["x"])
    out = fit.run(key, training, optimizer=optax.adam(5e-4), num_steps=20_000)
    posterior = npe.posterior(out)
    draws = posterior.sample(key, x_o, 10_000)       # {"theta": [10_000, ...]}

The loss -E log q(theta | x) under the joint law is least where q is the posterior of every x.  With
a budget of simulations, a tenth is held out, and training ends when that stops improving:

    training = npe.training(key, model, ..., num_simulations=10_000)
    out = fit.run(key, training, optimizer=..., num_steps=100_000,
                  chunk=training.draw.steps, patience=20, criterion=npe.held_out)

Latents of finite support stand beside the others, in a categorical head before the flow
(`discrete`):

    training = npe.training(key, model, latents=["temperature"], discrete=["topic"], ...)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict

import equinox as eqx
import jax
from jaxtyping import Array, Float, PRNGKeyArray

from ppl.checks import check_key

from ..fit import Fitted, History
from ..training import Training
from . import flows, summaries
from .batches import Batch, prepared
from .network import Network, network, remembering
from .posterior import Posterior, over
from .simulators import simulator


class Loss(eqx.Module):
    """-log q(theta | x), the mean over a batch, on R^D."""

    def __call__(
        self, network: Network, key: PRNGKeyArray, batch: Batch
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        del key
        return batch.losses(lambda rows: -network.log_prob(rows.theta, rows.x))


class Options(TypedDict, total=False):
    """How `training` may differ.

    discrete: names of latent sites of finite support.
    summary: one of `summaries`; `summaries.identity()` by default.
    num_simulations: a budget, drawn at once, of which a tenth is held out; by default new ones are
        drawn in every step, inside the compiled loop.
    batch_size: simulations to a step; 200 by default.
    args, kwargs: what the model is called with.
    """

    discrete: Sequence[str]
    summary: summaries.Summary | None
    num_simulations: int | None
    batch_size: int
    args: Sequence[Any]
    kwargs: Mapping[str, Any] | None


def training(
    key: PRNGKeyArray,
    model: Callable[..., Any],
    *,
    latents: Sequence[str],
    observed: Sequence[str],
    discrete: Sequence[str] = (),
    flow: flows.Family | None = None,
    summary: summaries.Summary | None = None,
    num_simulations: int | None = None,
    batch_size: int = 200,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> Training:
    """What `fit.run` minimises to learn the posterior of a model's latent sites.

    Args:
        key: for the network's start, and the simulations that are stored.
        model: a NumPyro model; what is observed is named, not fixed.
        latents, observed: names of its sites (`simulators.simulator`).
        discrete: names of latent sites of finite support.
        flow: a family of `flows`; `flows.spline_coupling()` if None.
        summary: one of `summaries`; `summaries.identity()` if None.
        num_simulations: a budget, drawn here, of which a tenth is held out; None draws new ones in
            every step, inside the compiled loop.
        batch_size: simulations to a step.
        args, kwargs: what the model is called with.

    Raises:
        ValueError: as in `simulators.simulator`, for a count that is not positive, or if no
            simulation is finite.
    """
    check_key(key)
    names = {"latents": latents, "observed": observed, "discrete": discrete}
    of = simulator(model, **names, args=args, kwargs=kwargs)
    first, second = jax.random.split(key)
    data = prepared(first, of, num_simulations, batch_size)
    start, draw = remembering(network(second, of, data.pilot, flow, summary), data.draw)
    return Training(start, draw, Loss(), data.start)


def held_out(rows: History) -> float:
    """A criterion of `fit.run`: the loss on what was held out, the mean over a chunk."""
    if "held_out" not in rows:
        raise ValueError(
            "expected a training with num_simulations, of which a part is held out, got one of"
            " fresh simulations, whose loss is its own check; leave out criterion"
        )
    return float(rows["held_out"].mean())


def posterior(out: Fitted) -> Posterior:
    """What a run has learned, its best parameters if there was `patience`."""
    return over(out.best)
