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

A prior may also be any NumPyro distribution over R^D, whose parameters a network then turns into
components.  Of such families a second update of what came out is learned as well,

    -E log q(theta | q(. | prior, y), y2)

for only what comes in first is of the family.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from ppl.checks import check_counts, check_key

from ..fit import Fitted
from ..training import Training
from .flows import lower
from .gaussians import Gaussians

Prior = Gaussians | dist.Distribution
"""A mixture, or a NumPyro distribution of which one draw is a theta [D]."""

SamplePrior = Callable[[PRNGKeyArray], Prior]
"""key -> a prior; all are of one family and shape."""

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
    """(prior, observations) -> posterior, a mixture of K Gaussians on R^D; so is the prior, or it
    is of the `family` of which `describe` makes components.
    """

    dim: int = eqx.field(static=True)
    family: str = eqx.field(static=True)
    describe: eqx.nn.MLP | None
    enter: eqx.nn.MLP
    read: eqx.nn.MLP
    nothing: Float[Array, " W"]
    layers: list[Layer]
    leave: eqx.nn.MLP

    def __call__(
        self,
        prior: Prior,
        y: Float[Array, "M P"],
        there: Bool[Array, " M"] | None = None,
    ) -> Gaussians:
        """The posterior given those of M observations that are `there`; all if None."""
        there = jnp.ones(len(y), bool) if there is None else there
        inputs = self.components(prior)
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

    def components(self, prior: Prior) -> Float[Array, "K S"]:
        """A prior as numbers, a row for each component.

        Raises:
            ValueError: if it is neither a mixture nor of the family that was trained on.
        """
        if isinstance(prior, Gaussians):
            return jax.vmap(_numbers)(prior.log_weights, prior.means, prior.factors)
        if self.describe is None or _family(prior) != self.family:
            raise ValueError(
                f"expected Gaussians{f' or a prior {self.family}' if self.family else ''}, which"
                f" were trained on, got {_family(prior)}; train on priors of its family"
            )
        return self.describe(ravel_pytree(prior)[0]).reshape(-1, _size(self.dim))


class Loss(eqx.Module):
    """-log q(theta | prior, y) - log q(theta | prior), and of priors that are no mixtures
    -log q(theta | q(. | prior, y), y2); the means over a batch.
    """

    def __call__(
        self, network: Transformer, key: PRNGKeyArray, batch: tuple[Prior, Array, Array, Array]
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        del key

        def one(prior: Prior, theta: Array, y: Array, y2: Array) -> dict[str, Array]:
            none = jnp.zeros(len(y), bool)
            posterior = network(prior, y)
            found = {"posterior": posterior, "prior": network(prior, y, none)}
            if not isinstance(prior, Gaussians):
                found["second"] = network(jax.lax.stop_gradient(posterior), y2)
            return {name: -law.log_prob(theta) for name, law in found.items()}

        losses = jax.vmap(one)(*batch)
        finite = jnp.isfinite(sum(losses.values()))
        num = jnp.maximum(finite.sum(), 1)
        means = {name: jnp.where(finite, x, 0).sum() / num for name, x in losses.items()}
        return jnp.stack(list(means.values())).sum(), means | {"invalid": 1 - finite.mean()}


class Draw(eqx.Module):
    """Priors, latents of them, and observations twice."""

    sample_prior: SamplePrior
    observe: Observe
    batch_size: int = eqx.field(static=True)

    def __call__(self, key: PRNGKeyArray, network: Any, data: None) -> tuple[Any, None]:
        def one(key: PRNGKeyArray) -> tuple[Prior, Array, Array, Array]:
            first, second, third, fourth = jax.random.split(key, 4)
            prior = self.sample_prior(first)
            theta = jnp.asarray(prior.sample(second))
            return prior, theta, self.observe(third, theta), self.observe(fourth, theta)

        return jax.vmap(one)(jax.random.split(key, self.batch_size)), data


def training(
    key: PRNGKeyArray,
    sample_prior: SamplePrior,
    observe: Observe,
    *,
    num_components: int = 4,
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
        num_components: K, of priors that are no mixtures.
        num_layers, width, num_heads, hidden: of the decoder.
        batch_size: priors to a step.

    Raises:
        ValueError: if a count is not positive, the heads do not share the width evenly, or a draw
            of a prior is no vector.
    """
    check_key(key)
    check_counts(num_layers=num_layers, width=width, num_heads=num_heads, hidden=hidden)
    check_counts(num_components=num_components, batch_size=batch_size)
    if width % num_heads:
        raise ValueError(f"expected a width that {num_heads} heads share evenly, got {width}")
    prior = jax.eval_shape(sample_prior, key)
    shape = jax.eval_shape(lambda key: sample_prior(key).sample(key), key).shape
    if len(shape) != 1:
        raise ValueError(
            f"expected a draw of a prior to be a vector [D], got shape {list(shape)}; make it one,"
            " with .expand([1]).to_event(1) if it is a number"
        )
    (dim,) = shape
    y = jax.eval_shape(observe, key, jnp.zeros(dim))
    first, *keys = jax.random.split(key, num_layers + 5)
    size, family, describe = _size(dim), "", None
    if not isinstance(prior, Gaussians):
        num = sum(leaf.size for leaf in jax.tree.leaves(prior))
        describe = eqx.nn.MLP(num, num_components * size, hidden, 2, jax.nn.gelu, key=first)
        family = _family(prior)
    leave = eqx.nn.MLP(width, size, width, 1, jax.nn.gelu, key=keys[2])
    network = Transformer(
        dim,
        family,
        describe,
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


def _family(prior: Prior) -> str:
    """The name of its class, with what that wraps."""
    name, inner = type(prior).__name__, getattr(prior, "base_dist", None)
    return name if inner is None else f"{name}({_family(inner)})"


def _size(dim: int) -> int:
    """Numbers of a component."""
    return 1 + 2 * dim + math.comb(dim, 2)


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
