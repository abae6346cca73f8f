"""Losses of variational inference that NumPyro does not have, as objectives of its own kind: each
is an `ELBO`, which `svi.training` takes, and `numpyro.infer.SVI` too.

| loss | of | |
| --- | --- | --- |
| AEVB, the ELBO | `numpyro.infer.Trace_ELBO`, `TraceMeanField_ELBO` | 1312.6114 |
| IWAE | `numpyro.infer.RenyiELBO(num_particles=K)` | 1509.00519 |
| discrete latents | `numpyro.infer.TraceGraph_ELBO`, `TraceEnum_ELBO` | |
| sticking the landing | `StickingTheLanding` | 1703.09194 |
| InfoVAE | `InfoVAE` | 1706.02262 |
| reweighted wake-sleep | `ReweightedWakeSleep` | 1406.2751 |
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray
from numpyro import handlers
from numpyro.infer import Trace_ELBO
from numpyro.infer.elbo import ELBO

from ppl.checks import check_count

from ..calibration.misspecification import kernel
from ..objectives import variational
from .densities import (
    Call,
    Program,
    Trace,
    Values,
    by_datum,
    drawn,
    replayed,
    run,
    samples,
    total,
    weighed,
)

Divergence = Callable[[Float[Array, "B D"], Float[Array, "B D"]], Float[Array, ""]]
"""(draws of q(z), draws of p(z)) -> how different they are."""

Measured = tuple[Float[Array, ""], dict[str, Array]]
"""A loss, and metrics of the training besides."""


class Objective(ELBO):
    """An objective of NumPyro that also has metrics."""

    def loss(
        self,
        rng_key: PRNGKeyArray,
        param_map: Values,
        model: Program,
        guide: Program,
        *args: Any,
        **kwargs: Any,
    ) -> Float[Array, ""]:
        """As NumPyro's."""
        return self.measured(rng_key, Call(model, guide, param_map, args, kwargs))[0]

    def loss_with_mutable_state(self, *args: Any, **kwargs: Any) -> Any:
        """As NumPyro's; there is none."""
        return {"loss": self.loss(*args, **kwargs), "mutable_state": None}

    def measured(self, key: PRNGKeyArray, call: Call) -> Measured:
        """The loss and metrics."""
        raise NotImplementedError

    def particles(self, key: PRNGKeyArray, one: Callable[[PRNGKeyArray], Any]) -> Any:
        """`num_particles` independent ones, [K, ...]."""
        return jax.vmap(one)(jax.random.split(key, self.num_particles))


class StickingTheLanding(Objective):
    """The ELBO with the path derivative alone as the guide's gradient: where the guide is the exact
    posterior, every draw has gradient zero (Roeder, Wu and Duvenaud 2017, arXiv 1703.09194).

        -E_q [ log p(x, z) - log q(z) ],   z = z(e, phi), and phi inside of log q a constant

    What is left out, d/dphi log q at a fixed z, has expectation zero.  The value is the ELBO's.
    """

    def __init__(self, num_particles: int = 1) -> None:
        check_count("num_particles", num_particles)
        super().__init__(num_particles)

    def measured(self, key: PRNGKeyArray, call: Call) -> Measured:
        """The loss; no metrics."""

        def elbo(key: PRNGKeyArray) -> Array:
            joint, guide = drawn(key, call, scored=jax.lax.stop_gradient)
            return total(joint) - total(guide)

        return -self.particles(key, elbo).mean(), {}


class InfoVAE(Objective):
    """The ELBO with other weights on what the KL divergence is made of (Zhao, Song and Ermon 2017,
    arXiv 1706.02262).

        -E log p(x | z) + (1 - alpha) KL(q(z | x) || p(z)) + (alpha + lam - 1) D(q(z) || p(z))

    summed over the data; q(z) = E_x q(z | x).  alpha = 0, lam = 1 is the ELBO, alpha = 1 - lam the
    beta-VAE with beta = lam.  With D = KL it is, per datum and up to the entropy of the data,

        lam KL(q(z) || p(z)) + E_q(z) KL(q(x | z) || p(x | z)) - alpha I_q(x, z)

    D is a maximum mean discrepancy by default: then it is no bound on log p(x).

    Attributes:
        alpha: what information of x and z earns; at most 1.
        lam: what the divergence of q(z) costs.
        site: the latent whose D it is, in the plate of the data.
        divergence: D, of draws for every datum of the batch and as many of the prior.
    """

    def __init__(
        self,
        alpha: float,
        lam: float,
        *,
        site: str,
        num_particles: int = 1,
        divergence: Divergence | None = None,
    ) -> None:
        check_count("num_particles", num_particles)
        if alpha > 1 or alpha + lam < 1:
            raise ValueError(
                "expected alpha <= 1 and alpha + lam >= 1, so that no divergence is sought, got"
                f" alpha = {alpha} and lam = {lam}; alpha = 0 and lam = 1 are the ELBO"
            )
        super().__init__(num_particles)
        self.alpha, self.lam, self.site = alpha, lam, site
        self.divergence = mmd if divergence is None else divergence

    def measured(self, key: PRNGKeyArray, call: Call) -> Measured:
        """The loss; metrics `elbo` of the data, and `divergence`."""
        elbo_key, draw_key, prior_key = jax.random.split(key, 3)
        costs: Any = Trace_ELBO(self.num_particles, sum_sites=False).loss(
            elbo_key, call.values, call.model, call.guide, *call.args, **call.kwargs
        )
        prior = run(prior_key, call.model, call.values, call)
        guide = run(draw_key, call.guide, call.values, call)
        seen = {name for name, site in samples(prior).items() if site["is_observed"]}
        kl = sum((cost for name, cost in costs.items() if name not in seen), jnp.zeros(()))
        misfit = sum((cost for name, cost in costs.items() if name in seen), jnp.zeros(()))
        apart = self.divergence(_rows(guide, self.site), _rows(prior, self.site))
        size = prior[_plate(prior, self.site)]["args"][0]
        weight = (self.alpha + self.lam - 1) * size
        loss = misfit + (1 - self.alpha) * kl + weight * apart
        return loss, {"elbo": -(misfit + kl), "divergence": apart}


class ReweightedWakeSleep(Objective):
    """Learns the model and the guide by self-normalised weights, so that latents may be discrete
    (Bornschein and Bengio 2015, arXiv 1406.2751).

        wake-theta   -sum_k w_k log p(x, z_k)      z_k ~ q(z | x), w_k = softmax_k(log p - log q)
        wake-phi     -sum_k w_k log q(z_k | x)     towards KL(p(z | x) || q(z | x))
        sleep-phi    -log q(z | x)                 z, x ~ p

    No gradient passes through draws and weights (`amortized.objectives.variational`).  The exact
    posterior is a fixed point of both kinds of phi, for every K.

    Attributes:
        num_particles: K.
        sleep: the share of sleep-phi in the loss of the guide; wake-phi has the rest.  For it the
            observed sites are drawn, and given to the guide under their names: both take them as
            keyword arguments that are called as the sites are.
    """

    can_infer_discrete = True

    def __init__(self, num_particles: int, *, sleep: float = 0.0) -> None:
        check_count("num_particles", num_particles)
        if not 0 <= sleep <= 1:
            raise ValueError(f"expected sleep as a share in [0, 1], got {sleep}")
        super().__init__(num_particles)
        self.sleep = sleep

    def measured(self, key: PRNGKeyArray, call: Call) -> Measured:
        """The loss; metrics `bound`, the importance-weighted one of the data, and `ess`, the mean
        effective share of the particles.
        """
        wake_key, sleep_key = jax.random.split(key)
        one = functools.partial(weighed, call=call, draws=jax.lax.stop_gradient)
        each = self.particles(wake_key, one)
        log_p, log_q = (values.reshape(self.num_particles, -1) for values in each[:2])
        log_weights, num = log_p - log_q, log_p.shape[1]
        groups = jnp.broadcast_to(jnp.arange(num, dtype=jnp.int32), log_p.shape).ravel()
        size = num * each.scale[0]

        def wake(scores: Array) -> Array:
            return size * variational.forward_kl(scores.ravel(), log_weights.ravel(), groups)

        loss = wake(log_p)
        if self.sleep < 1:
            loss = loss + (1 - self.sleep) * wake(log_q)
        if self.sleep:
            loss = loss + self.sleep * size * variational.sleep(_dreamt(sleep_key, call))
        share = jax.nn.softmax(jax.lax.stop_gradient(log_weights), axis=0)
        ess = (1 / (share**2).sum(0)).mean() / self.num_particles
        return loss, {"bound": size * variational.iwae(log_weights.ravel(), groups), "ess": ess}


def mmd(left: Float[Array, "B D"], right: Float[Array, "B D"]) -> Float[Array, ""]:
    """The squared maximum mean discrepancy of two laws from B draws of each, without bias, so that
    it may be below zero.

    The kernel is that of `calibration.misspecification`; its unit, the mean squared distance of the
    draws on the right, has no gradient.
    """
    num = len(right)
    spread = 2 * right.var(0).sum() * num / (num - 1)
    unit = jax.lax.stop_gradient(jnp.where(spread > 0, spread, 1.0))

    def within(rows: Array) -> Array:
        # Every row is at distance zero from itself, where the kernel is 1.
        return (kernel(rows, rows, unit).sum() - num) / (num * (num - 1))

    return within(left) - 2 * kernel(left, right, unit).mean() + within(right)


def _dreamt(key: PRNGKeyArray, call: Call) -> Float[Array, " B"]:
    """log q(z | x) of a draw of the model, by datum."""
    first, second = jax.random.split(key)
    asleep = jax.lax.stop_gradient(call.values)
    dream = run(first, handlers.uncondition(call.model), asleep, call)
    seen = [name for name, site in samples(dream).items() if site["infer"].get("was_observed")]
    if missing := [name for name in seen if name not in call.kwargs]:
        raise ValueError(
            "expected the observed sites of a model that dreams to be its keyword arguments, got"
            f" {missing} observed and the arguments {sorted(call.kwargs)}; call site and argument"
            " alike, or leave out sleep"
        )
    given = call._replace(kwargs=call.kwargs | {name: dream[name]["value"] for name in seen})
    guide = run(second, replayed(call.guide, dream), call.values, given)
    if alone := [name for name in samples(guide) if name not in dream]:
        raise ValueError(
            f"expected a guide whose sites are those of the model, got {alone} besides, which the"
            " model does not dream; leave out sleep"
        )
    return by_datum(guide, guide).log_q.ravel()


def _plate(trace: Trace, site: str) -> str:
    """The plate of a latent, of which there must be one."""
    found = [frame.name for frame in trace[site]["cond_indep_stack"]] if site in trace else []
    if len(found) != 1:
        raise ValueError(
            f"expected a site {site!r} in one plate, that of the data, got"
            f" {found if site in trace else sorted(samples(trace))}"
        )
    return found[0]


def _rows(trace: Trace, site: str) -> Float[Array, "B D"]:
    """A latent's values, a row for each datum."""
    _plate(trace, site)
    value = trace[site]["value"]
    return value.reshape(len(value), -1).astype(jnp.result_type(value, jnp.float32))
