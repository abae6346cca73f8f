"""Neural likelihood estimation: q(x | theta) by maximum likelihood on simulations, and the NumPyro
model that it makes (Papamakarios, Sterratt and Murray 2019, arXiv 1805.07226).

    training = nle.training(key, model, latents=["theta"], observed=["x"])
    out = fit.run(key, training, optimizer=optax.adam(5e-4), num_steps=20_000)
    learned = nle.model(out, x_o)            # prior times learned likelihood: a NumPyro model
    particles = tempered.run(key, learned, ladder=...)
    MCMC(NUTS(learned), ...).run(key)

What has been learned is a model like any other, so that every sampler of `samplers.latent` and all
of NumPyro's draw from it; several independent observations are several factors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
from flowjax.distributions import AbstractDistribution
from jaxtyping import Array, Float, PRNGKeyArray
from paramax import non_trainable

from ppl.checks import check_key

from ..fit import Fitted
from ..training import Training
from . import flows
from .batches import Batch, prepared
from .simulators import Observation, Simulator, conditioned, simulator
from .summaries import Standardised, flat


class Likelihood(eqx.Module):
    """q(x | theta) of all observed numbers, both standardised.

    Attributes:
        simulator: the model; fixed.
        density: of standardised observations given standardised latents.
        latents, observations: their scales; fixed.
    """

    simulator: Simulator
    density: AbstractDistribution
    latents: Standardised
    observations: Standardised

    def log_prob(self, theta: Float[Array, "B D"], x: Observation) -> Float[Array, " B"]:
        """log q of B observations, each given its own latents on R^D."""
        values = jax.vmap(lambda x: self.observations(flat(x)))(x)
        return self.density.log_prob(values, jax.vmap(self.latents)(theta)) - (
            self.observations.log_scale
        )


class Loss(eqx.Module):
    """-log q(x | theta), the mean over a batch."""

    def __call__(
        self, network: Likelihood, key: PRNGKeyArray, batch: Batch
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        del key
        return batch.losses(lambda rows: -network.log_prob(rows.theta, rows.x))


def training(
    key: PRNGKeyArray,
    model: Callable[..., Any],
    *,
    latents: Sequence[str],
    observed: Sequence[str],
    flow: flows.Family | None = None,
    num_simulations: int | None = None,
    batch_size: int = 200,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> Training:
    """What `fit.run` minimises to learn the likelihood of a model's latent sites.

    Arguments and errors as in `npe.training`; the flow is of the observed numbers.

    Raises:
        ValueError: if an observed site is discrete, of which a flow is no density.
    """
    check_key(key)
    of = simulator(model, latents=latents, observed=observed, args=args, kwargs=kwargs)
    if discrete := [site.name for site in of.observed if not site.dtype.startswith("float")]:
        raise ValueError(
            f"expected continuous observed sites, got discrete {discrete}, of which a flow is no"
            " density; use npe, or nre"
        )
    first, second = jax.random.split(key)
    data = prepared(first, of, num_simulations, batch_size)
    rows = jax.vmap(flat)(data.pilot.x)
    family = flows.spline_coupling() if flow is None else flow
    density = family(second, rows.shape[1], of.dim)
    scales = Standardised(data.pilot.theta), Standardised(rows)
    start = Likelihood(non_trainable(of), density, *scales)
    return Training(start, data.draw, Loss(), data.start)


def model(out: Fitted, x: Any) -> Callable[[], dict[str, Array]]:
    """The prior of the latent sites times the learned likelihood of an observation: a NumPyro model
    without arguments.

    Raises:
        ValueError: for an observation of another shape or that is not finite.
    """
    network = out.best
    seen = network.simulator.observation(x)

    def log_likelihood(theta: Float[Array, " D"]) -> Float[Array, ""]:
        rows = jax.tree.map(lambda leaf: leaf[None], seen)
        return network.log_prob(theta[None], rows)[0]

    return conditioned(network.simulator, log_likelihood)
