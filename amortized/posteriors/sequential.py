"""Sequential posterior estimation: rounds of simulations where the posterior of one observation is.

    out = sequential.run(
        key, model, x_o, latents=["theta"], observed=["x"], num_rounds=10, num_simulations=1000,
        optimizer=optax.adam(5e-4),
    )
    out.posterior.sample(key, x_o, 10_000)

Round 1 draws from the prior, every later one from what has been learned; the network goes on from
where it was, on all simulations so far.  Two ways to learn the posterior and not the proposal:

| how | draws from | loss | paper |
| --- | --- | --- | --- |
| `Atomic(K)` | q(. given x_o) | which of K latents is the own | APT: 1905.07488 |
| `Truncated(e)` | the prior, but for a share e of q(. given x_o) | NPE's | TSNPE: 2210.04815 |

What comes out is right at x_o alone.  On R^D no proposal leaves the prior's support.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from ppl.checks import check_counts, check_key
from ppl.rows import take_rows
from ppl.showing import shown

from .. import fit
from ..training import Training
from . import flows, npe, summaries
from .batches import Batch, finite
from .network import Network, network
from .posterior import Posterior, over
from .simulators import Simulations, Simulator, simulator

CHUNK = 50
"""Steps between two looks at the loss on what is held out."""
TRIES = 1000
"""How often a truncated prior is tried for every draw that is wanted."""


@shown
@dataclasses.dataclass(frozen=True)
class Rounds:
    """What rounds have given.

    Attributes:
        posterior: right at the observation that they were for.
        fits: of every round.
        num_simulations: that were finite, of all rounds.
    """

    posterior: Posterior
    fits: list[fit.Fitted]
    num_simulations: int


class Atomic(eqx.Module):
    """Proposals are draws of q(. | x_o); -log of the share of the own latent among `num_atoms` of
    the batch, each with weight q(theta | x) / p(theta).

    Whatever the latents were drawn from cancels, and the loss is least at the posterior.
    """

    num_atoms: int = eqx.field(static=True, default=10)

    def propose(self, key: PRNGKeyArray, posterior: Posterior, x: Any, num: int) -> Array:
        """`num` latents on R^D."""
        return posterior.draws(key, x, num)

    def check_held_out(self, num: int) -> None:
        if num < self.num_atoms:
            raise ValueError(
                f"expected at least {self.num_atoms} simulations held out, as many as there are"
                f" atoms, got {num}; draw more than {10 * self.num_atoms} in a round"
            )

    def __call__(
        self, network: Network, key: PRNGKeyArray, batch: Batch
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        del key
        return batch.losses(lambda rows: self.each(network, rows))

    def each(self, network: Network, rows: Simulations) -> Float[Array, " B"]:
        """The loss of every row."""
        size = len(rows.theta)
        log_prior = jax.vmap(network.simulator.log_prior)(rows.theta)
        contexts = jax.vmap(network.summary)(rows.x)
        others = (jnp.arange(size)[:, None] + jnp.arange(self.num_atoms)) % size
        log_q = jax.vmap(network.given)(rows.theta[others], contexts)
        return -jax.nn.log_softmax(log_q - log_prior[others], axis=1)[:, 0]


class Truncated(npe.Loss):
    """Proposals are draws of the prior that are not in the `outside` least probable share of
    q(. | x_o); the loss is that of `npe`, for such a prior has the same posterior where it counts.
    """

    outside: float = eqx.field(static=True, default=1e-4)

    def propose(self, key: PRNGKeyArray, posterior: Posterior, x: Any, num: int) -> Array:
        """`num` latents on R^D.

        Raises:
            RuntimeError: if of 1,000 draws of the prior not one in the mean is inside.
        """
        network, context = posterior.network, posterior.context(x)
        first, *keys = jax.random.split(key, 1 + TRIES)
        own = _log_q(network, posterior.draws(first, x, 10_000), context)
        least = jnp.quantile(own, self.outside)
        kept: list[np.ndarray] = []
        for tries, key in enumerate(keys, 1):
            theta = network.simulator.draws(key, num).theta
            kept.append(np.asarray(theta)[np.asarray(_log_q(network, theta, context) >= least)])
            if sum(map(len, kept)) >= num:
                return jnp.asarray(np.concatenate(kept)[:num])
            if tries * num >= TRIES * max(sum(map(len, kept)), 1):
                break
        raise RuntimeError(
            f"expected at least one in {TRIES} draws of the prior inside the truncated one, got"
            f" {sum(map(len, kept))} of {tries * num}: the posterior is too small a part of the"
            " prior for rejection; take how=Atomic()"
        )


class Growing(eqx.Module):
    """Draws from the first `num` of stored simulations, whose arrays have room for all rounds, so
    that one program serves them all.

    No batch has a simulation twice: among atoms the own latent would be another's as well.
    """

    rows: Simulations
    held_out: Simulations
    num: Int[Array, ""]
    num_held_out: Int[Array, ""]
    batch_size: int = eqx.field(static=True)
    watched: int = eqx.field(static=True)

    def __call__(self, key: PRNGKeyArray, network: Any, data: None) -> tuple[Batch, None]:
        del network
        first, second = jax.random.split(key)
        rows = _some(first, self.rows, self.num, self.batch_size)
        watched = _some(second, self.held_out, self.num_held_out, self.watched)
        return Batch(rows, jnp.ones(self.batch_size, bool), watched), data


def _some(key: PRNGKeyArray, rows: Simulations, num: Array, size: int) -> Simulations:
    """`size` different ones of the first `num`."""
    room = len(rows.theta)
    order = jnp.where(jnp.arange(room) < num, jax.random.uniform(key, (room,)), -1.0)
    return take_rows(rows, jax.lax.top_k(order, size)[1])


def run(
    key: PRNGKeyArray,
    model: Callable[..., Any],
    x: Any,
    *,
    latents: Sequence[str],
    observed: Sequence[str],
    optimizer: optax.GradientTransformation,
    discrete: Sequence[str] = (),
    how: Atomic | Truncated | None = None,
    num_rounds: int = 10,
    num_simulations: int = 1000,
    num_steps: int = 5000,
    patience: int = 20,
    batch_size: int = 200,
    flow: flows.Family | None = None,
    summary: summaries.Summary | None = None,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Rounds:
    """Learn the posterior of one observation in rounds.

    Args:
        key: typed key.
        model, latents, observed, discrete, flow, summary, args, kwargs: as in `npe.training`.
        x: the observed sites by name, or of a single one the array.
        optimizer: any of optax, begun anew in every round.
        how: `Atomic()` or `Truncated()`.
        num_rounds: R.
        num_simulations: of each round; a tenth is held out.
        num_steps: at most, of each round.
        patience: ends a round after so many times 50 steps without a better held-out loss.
        batch_size: simulations to a step.
        progress: a bar for each round.

    Raises:
        ValueError: as `npe.training`, and for an observation of another shape; with `Atomic` also
            if the model has latent sites that are not inferred, whose prior would be needed.
        RuntimeError: as `Truncated.propose`.
    """
    check_key(key)
    check_counts(num_rounds=num_rounds, num_simulations=num_simulations, batch_size=batch_size)
    how = Atomic() if how is None else how
    names = {"latents": latents, "observed": observed, "discrete": discrete}
    of = simulator(model, **names, args=args, kwargs=kwargs)
    of.observation(x)
    if isinstance(how, Atomic):
        of.check_no_nuisance()
    begin, *keys = jax.random.split(key, 1 + num_rounds)
    options: dict[str, Any] = {"optimizer": optimizer, "num_steps": num_steps, "patience": patience}
    options |= {"chunk": CHUNK, "criterion": npe.held_out, "progress": progress}
    room, found, fits = num_rounds * num_simulations, [], []
    for first, second in map(jax.random.split, keys):
        posterior = over(fits[-1].best) if fits else None
        found.append(finite(_simulated(first, of, how, posterior, x, num_simulations)))
        start = fits[-1].best if fits else network(begin, of, found[0], flow, summary)
        draw, loss = _stored(found, room, batch_size, how), how if fits else npe.Loss()
        fits.append(fit.run(second, Training(start, draw, loss), **options))
    return Rounds(over(fits[-1].best), fits, sum(len(rows.theta) for rows in found))


def _simulated(
    key: PRNGKeyArray,
    of: Simulator,
    how: Atomic | Truncated,
    posterior: Posterior | None,
    x: Any,
    num: int,
) -> Simulations:
    """A round's simulations: of the prior, or of what was learned before."""
    if posterior is None:
        return of.draws(key, num)
    first, second = jax.random.split(key)
    theta = how.propose(first, posterior, x, num)
    return Simulations(theta, _simulate(of, jax.random.split(second, num), theta))


def _stored(
    found: list[Simulations], room: int, batch_size: int, how: Atomic | Truncated
) -> Growing:
    """All simulations so far in arrays with room for all rounds; a tenth of them is held out."""
    rows: Simulations = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *found)
    # Every tenth simulation is held out, and stays so in later rounds.
    number = jnp.arange(len(rows.theta))
    parts = take_rows(rows, number[number % 10 != 9]), take_rows(rows, number[number % 10 == 9])
    num, num_held_out = (len(part.theta) for part in parts)
    if num < batch_size or not num_held_out:
        raise ValueError(
            f"expected at least a batch of {batch_size} simulations to learn from, and one to hold"
            f" out, got {num} and {num_held_out}; draw more, or take smaller batches"
        )

    def padded(leaf: Array, size: int) -> Array:
        return jnp.zeros((size, *leaf.shape[1:]), leaf.dtype).at[: len(leaf)].set(leaf)

    learned, unseen = (
        jax.tree.map(lambda leaf, size=size: padded(leaf, size), part)
        for part, size in zip(parts, (room, room // 10 + 1), strict=True)
    )
    counts = jnp.int32(num), jnp.int32(num_held_out)
    # As many in every round, so that it has the program of the first.
    watched = min(max(batch_size // 5, 20), len(found[0].theta) // 10)
    if isinstance(how, Atomic):
        how.check_held_out(watched)
    return Growing(learned, unseen, *counts, batch_size, watched)


@eqx.filter_jit
def _simulate(of: Simulator, keys: Any, theta: Float[Array, "N D"]) -> dict[str, Array]:
    return jax.vmap(of.simulate)(keys, theta)


@eqx.filter_jit
def _log_q(net: Network, theta: Float[Array, "N D"], context: Array) -> Float[Array, " N"]:
    return net.given(theta, context)
