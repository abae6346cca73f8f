"""Distribution Transformers: the prior is an input, and the posterior comes out as a mixture of
Gaussians that can be the next prior (Whittle et al. 2025, arXiv 2502.02463).

    training = distribution_transformer.training(key, sample_prior, observe)
    update = distribution_transformer.update(fit.run(key, training, ...))
    posterior = update(prior, y)          # Gaussians, for any prior of K components
    posterior = update(posterior, y2)     # filtering

Every component of the prior is a token, [logit w, mu, log diag L, what of L is below], every
observation another; a decoder without positions lets components look at each other and at the
data, so that components in another order come out in that order.  What is learned is, over priors,
latents and data that are drawn anew in every step,

    -E log q(theta | prior, y) - E log q(theta | prior, no data)

the second so that a prior which nothing is known of stays what it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from ppl.checks import check_counts, check_key

from ..fit import Fitted
from ..training import Training
from .flows import lower
from .gaussians import Gaussians

SamplePrior = Callable[[PRNGKeyArray], Gaussians]
"""key -> a prior; K and D are the same for all."""

Observe = Callable[[PRNGKeyArray, Float[Array, " D"]], Float[Array, "M P"]]
"""(key, theta) -> M observations of P numbers."""


class Layer(eqx.Module):
    """Components look at each other, at the data, and each at itself; normalised after each."""

    among: eqx.nn.MultiheadAttention
    across: eqx.nn.MultiheadAttention
    network: eqx.nn.MLP
    norms: tuple[eqx.nn.LayerNorm, eqx.nn.LayerNorm, eqx.nn.LayerNorm]

    def __init__(self, key: PRNGKeyArray, width: int, num_heads: int, hidden: int):
        first, second, third = jax.random.split(key, 3)
        # What is added is nothing at first.
        self.among, self.across = (
            _silent(eqx.nn.MultiheadAttention(num_heads, width, key=key), _of_attention)
            for key in (first, second)
        )
        network = eqx.nn.MLP(width, width, hidden, 1, jax.nn.gelu, key=third)
        self.network = _silent(network, _last)
        self.norms = (eqx.nn.LayerNorm(width), eqx.nn.LayerNorm(width), eqx.nn.LayerNorm(width))

    def __call__(
        self, tokens: Float[Array, "K W"], data: Float[Array, "M W"], there: Bool[Array, " M"]
    ) -> Float[Array, "K W"]:
        first, second, third = map(jax.vmap, self.norms)
        tokens = first(tokens + self.among(tokens, tokens, tokens))
        mask = jnp.broadcast_to(there, (len(tokens), len(data)))
        tokens = second(tokens + self.across(tokens, data, data, mask))
        return third(tokens + jax.vmap(self.network)(tokens))


class Transformer(eqx.Module):
    """(prior, observations) -> posterior, both mixtures of K Gaussians on R^D."""

    dim: int = eqx.field(static=True)
    enter: eqx.nn.MLP
    read: eqx.nn.MLP
    nothing: Float[Array, " W"]
    layers: list[Layer]
    leave: eqx.nn.MLP

    def __call__(
        self,
        prior: Gaussians,
        y: Float[Array, "M P"],
        there: Bool[Array, " M"] | None = None,
    ) -> Gaussians:
        """The posterior given those of M observations that are `there`; all if None."""
        there = jnp.ones(len(y), bool) if there is None else there
        inputs = jax.vmap(_numbers)(prior.log_weights, prior.means, prior.factors)
        tokens = jax.vmap(self.enter)(inputs)
        # One token stands for no data at all, so that attention always has something to look at.
        data = jnp.concatenate([self.nothing[None], jax.vmap(self.read)(y)])
        seen = jnp.concatenate([jnp.ones(1, bool), there])
        for layer in self.layers:
            tokens = layer(tokens, data, seen)
        changes = jax.vmap(self.leave)(tokens)
        # What comes out is the prior and a change.
        outputs = inputs + changes
        logits, means, log_scales, below = jnp.split(
            outputs, [1, 1 + self.dim, 1 + 2 * self.dim], axis=1
        )
        factors = jax.vmap(lower)(log_scales, below)
        return Gaussians(jax.nn.log_softmax(logits[:, 0]), means, factors)


class Loss(eqx.Module):
    """-log q(theta | prior, y) - log q(theta | prior), the means over a batch."""

    def __call__(
        self, network: Transformer, key: PRNGKeyArray, batch: tuple[Gaussians, Array, Array]
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        del key

        def one(prior: Gaussians, theta: Array, y: Array) -> tuple[Array, Array]:
            none = jnp.zeros(len(y), bool)
            posterior, again = network(prior, y), network(prior, y, none)
            return posterior.log_prob(theta), again.log_prob(theta)

        posterior, prior = jax.vmap(one)(*batch)
        finite = jnp.isfinite(posterior) & jnp.isfinite(prior)

        def mean(values: Array) -> Array:
            return jnp.where(finite, values, 0).sum() / jnp.maximum(finite.sum(), 1)

        metrics = {
            "posterior": -mean(posterior),
            "prior": -mean(prior),
            "invalid": 1 - finite.mean(),
        }
        return -mean(posterior) - mean(prior), metrics


class Draw(eqx.Module):
    """Priors, latents of them, and observations."""

    sample_prior: SamplePrior
    observe: Observe
    batch_size: int = eqx.field(static=True)

    def __call__(self, key: PRNGKeyArray, network: Any, data: None) -> tuple[Any, None]:
        def one(key: PRNGKeyArray) -> tuple[Gaussians, Array, Array]:
            first, second, third = jax.random.split(key, 3)
            prior = self.sample_prior(first)
            theta = prior.sample(second)
            return prior, theta, self.observe(third, theta)

        return jax.vmap(one)(jax.random.split(key, self.batch_size)), data


def training(
    key: PRNGKeyArray,
    sample_prior: SamplePrior,
    observe: Observe,
    *,
    num_layers: int = 4,
    width: int = 32,
    num_heads: int = 4,
    hidden: int = 128,
    batch_size: int = 500,
) -> Training:
    """What `fit.run` minimises to learn the update of a family of priors by a kind of data.

    Args:
        sample_prior: key -> a prior, from the law over which the update is to be good.
        observe: (key, theta) -> observations [M, P].
        num_layers, width, num_heads, hidden: of the decoder.
        batch_size: priors to a step.

    Raises:
        ValueError: if a count is not positive, or the heads do not share the width evenly.
    """
    check_key(key)
    check_counts(num_layers=num_layers, width=width, num_heads=num_heads, hidden=hidden)
    check_counts(batch_size=batch_size)
    if width % num_heads:
        raise ValueError(f"expected a width that {num_heads} heads share evenly, got {width}")
    prior = jax.eval_shape(sample_prior, key)
    dim = prior.means.shape[-1]
    y = jax.eval_shape(observe, key, jnp.zeros(dim))
    keys = jax.random.split(key, num_layers + 4)
    size = 1 + 2 * dim + math.comb(dim, 2)
    leave = eqx.nn.MLP(width, size, width, 1, jax.nn.gelu, key=keys[2])
    network = Transformer(
        dim,
        eqx.nn.MLP(size, width, 32, 1, jax.nn.gelu, key=keys[0]),
        eqx.nn.MLP(y.shape[1], width, 32, 1, jax.nn.gelu, key=keys[1]),
        jax.random.normal(keys[3], (width,)),
        [Layer(key, width, num_heads, hidden) for key in keys[4:]],
        _silent(leave, _last),
    )
    return Training(network, Draw(sample_prior, observe, batch_size), Loss())


def update(out: Fitted) -> Callable[..., Gaussians]:
    """What a run has learned: (prior, y, there=None) -> posterior, compiled (`Transformer`)."""
    return eqx.filter_jit(out.best)


def _numbers(log_weight: Array, mean: Array, factor: Array) -> Float[Array, " S"]:
    """A component as a token."""
    below = factor[jnp.tril_indices(len(mean), -1)]
    return jnp.concatenate([log_weight[None], mean, jnp.log(jnp.diag(factor)), below])


def _of_attention(attention: Any) -> Any:
    return attention.output_proj.weight


def _last(network: Any) -> Any:
    return network.layers[-1].weight, network.layers[-1].bias


def _silent(module: Any, where: Callable[[Any], Any]) -> Any:
    """The module with zeros there."""
    return eqx.tree_at(where, module, jax.tree.map(jnp.zeros_like, where(module)))
