"""Neural ratio estimation: log p(x | theta) / p(x) by telling pairs apart, and the NumPyro model
that it makes.

    training = nre.training(key, model, latents=["theta"], observed=["x"], loss=nre.Contrastive())
    learned = nre.model(fit.run(key, training, ...), x_o)     # prior times ratio: a NumPyro model

| loss | how pairs are told apart | paper |
| --- | --- | --- |
| `Binary()` | joint or marginal (A) | Hermans et al. 2020, 1903.04057 |
| `Contrastive(K)` | which of K latents is the own (B) | Durkan et al. 2020, 2002.03712 |
| `Bounded(K, gamma)` | which of K, or none (C) | Miller et al. 2022, 2210.06170 |
| `Balanced(strength)` | A, kept conservative by a penalty | Delaunoy et al. 2022, 2208.13624 |

The optimum of A, C and the balanced form is the ratio itself; that of B is known up to a function
of x, which no sampler of theta sees.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray
from paramax import non_trainable

from ppl.checks import check_key

from ..fit import Fitted
from ..training import Training
from . import summaries
from .batches import Batch, Fresh, prepared
from .simulators import Simulations, Simulator, conditioned, simulator
from .summaries import Standardised


class Ratio(eqx.Module):
    """log p(x | theta) / p(x), up to what the loss leaves open.

    Attributes:
        simulator: the model; fixed.
        summary: observation -> context.
        network: of standardised latents and context.
        standard: the scales of the latents; fixed.
    """

    simulator: Simulator
    summary: summaries.Reads
    network: eqx.nn.MLP
    standard: Standardised

    def __call__(self, theta: Float[Array, " D"], context: Float[Array, " C"]) -> Float[Array, ""]:
        return self.network(jnp.concatenate([self.standard(theta), context]))

    def table(self, rows: Simulations, num: int) -> Float[Array, "B K"]:
        """The ratio of every observation with its own latents, and with those of the num - 1 rows
        after it.
        """
        contexts, size = jax.vmap(self.summary)(rows.x), len(rows.theta)
        others = (jnp.arange(size)[:, None] + jnp.arange(num)) % size
        each = jax.vmap(jax.vmap(self, (0, None)))
        return each(rows.theta[others], contexts)


class Binary(eqx.Module):
    """Is a pair of the joint law, or of the product of the marginals? (A)

    Every form takes the ratios [B, columns] of B observations, each with its own latents first and
    then with others', and returns B losses.
    """

    columns: ClassVar[int] = 2

    def __call__(self, table: Float[Array, "B K"]) -> Float[Array, " B"]:
        own, other = table.T
        return jax.nn.softplus(-own) + jax.nn.softplus(other)


class Contrastive(eqx.Module):
    """Which of K latents is an observation's own? (B)"""

    columns: int = eqx.field(static=True, default=10)

    def __call__(self, table: Float[Array, "B K"]) -> Float[Array, " B"]:
        return -jax.nn.log_softmax(table)[:, 0]


class Bounded(eqx.Module):
    """Which of K latents is an observation's own, or none of K? (C), with odds gamma for one."""

    num: int = eqx.field(static=True, default=10)
    gamma: float = eqx.field(static=True, default=1.0)

    @property
    def columns(self) -> int:
        """K, and one more for the K that are all others'."""
        return self.num + 1

    def __call__(self, table: Float[Array, "B K"]) -> Float[Array, " B"]:
        log_gamma, log_num = jnp.log(self.gamma), jnp.log(self.num)
        one, none = log_gamma + table[:, :-1], log_gamma + table[:, 1:]
        joint = one[:, 0] - jnp.logaddexp(log_num, jax.nn.logsumexp(one, 1))
        marginal = log_num - jnp.logaddexp(log_num, jax.nn.logsumexp(none, 1))
        return -(self.gamma * joint + marginal) / (1 + self.gamma)


class Balanced(eqx.Module):
    """A, and strength * (E sigma(joint) + E sigma(marginal) - 1)^2."""

    columns: ClassVar[int] = 2
    strength: float = eqx.field(static=True, default=100.0)

    def __call__(self, table: Float[Array, "B K"]) -> Float[Array, " B"]:
        own, other = table.T
        balance = jnp.mean(jax.nn.sigmoid(own) + jax.nn.sigmoid(other) - 1)
        return Binary()(table) + self.strength * balance**2


Form = Binary | Contrastive | Bounded | Balanced


class Loss(eqx.Module):
    """A classifier's loss, the mean over a batch."""

    form: Form

    def __call__(
        self, network: Ratio, key: PRNGKeyArray, batch: Batch
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        del key
        return batch.losses(lambda rows: self.form(network.table(rows, self.form.columns)))


def training(
    key: PRNGKeyArray,
    model: Callable[..., Any],
    *,
    latents: Sequence[str],
    observed: Sequence[str],
    loss: Form | None = None,
    summary: summaries.Summary | None = None,
    width: int = 64,
    depth: int = 2,
    num_simulations: int | None = None,
    batch_size: int = 200,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> Training:
    """What `fit.run` minimises to learn the ratio of likelihood to evidence.

    Args:
        loss: one of this module's; `Contrastive()` if None.
        width, depth: of the classifier's hidden layers.
        Others and errors as in `npe.training`.

    Raises:
        ValueError: if a batch has no room for the latents that the loss compares.
    """
    check_key(key)
    form = Contrastive() if loss is None else loss
    if form.columns >= batch_size:
        raise ValueError(
            f"expected batch_size above the {form.columns} latents that the loss compares, got"
            f" {batch_size}"
        )
    of = simulator(model, latents=latents, observed=observed, args=args, kwargs=kwargs)
    first, second, third = jax.random.split(key, 3)
    data = prepared(first, of, num_simulations, batch_size)
    watched = 0 if isinstance(data.draw, Fresh) else data.draw.watched
    if 0 < watched <= form.columns:
        raise ValueError(
            f"expected more than {form.columns} simulations held out in a step, as many as the loss"
            f" compares, got {watched}; take larger batches"
        )
    reads = (summaries.identity() if summary is None else summary)(second, data.pilot)
    size = summaries.size(reads, data.pilot)
    network = eqx.nn.MLP(of.dim + size, "scalar", width, depth, jax.nn.gelu, key=third)
    start = Ratio(non_trainable(of), reads, network, Standardised(data.pilot.theta))
    return Training(start, data.draw, Loss(form), data.start)


def model(out: Fitted, x: Any) -> Callable[[], dict[str, Array]]:
    """The prior of the latent sites times the learned ratio at an observation: a NumPyro model
    without arguments.

    Raises:
        ValueError: for an observation of another shape or that is not finite.
    """
    network: Ratio = out.best
    context = network.summary(network.simulator.observation(x))
    return conditioned(network.simulator, lambda theta: network(theta, context))
