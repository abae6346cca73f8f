"""How likely a prefix is to end well: quantiles of its chance of success, by regression.

    training = success.training(key, features, shares)      # [N, D] hidden states, [N] of rollouts
    chances = success.quantiles(fit.run(key, training, optimizer=optax.adam(1e-3), num_steps=2_000))
    chances(features)                                        # [N, 3], at levels .1, .5, .9
    allocation.ias(chances(features)[:, 0])                  # draws by the cautious one

A process reward says how good a prefix looks; what a budget asks is how often it succeeds, and how
sure that is.  The pinball loss at level b,

    b max(0, p - r) + (1 - b) max(0, r - p)

is least where r is the b-quantile of p given the features (arXiv 2506.09338).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray
from paramax import NonTrainable, unwrap

from ppl.checks import check_counts, check_key

from ..fit import Fitted
from ..training import Rows, Training


class Quantiles(eqx.Module):
    """Features [D] -> quantiles [B] of a chance, in increasing order."""

    network: eqx.nn.MLP
    mean: NonTrainable[Float[Array, " D"]]
    scale: NonTrainable[Float[Array, " D"]]

    def __call__(self, features: Float[Array, " D"]) -> Float[Array, " B"]:
        first, *more = self.network((features - unwrap(self.mean)) / unwrap(self.scale))
        steps = [jax.nn.softplus(value) for value in more]
        return jax.nn.sigmoid(jnp.cumsum(jnp.stack([first, *steps])))


class Loss(eqx.Module):
    """The mean pinball loss over rows and levels."""

    levels: Float[Array, " B"]

    def __call__(
        self, network: Quantiles, key: PRNGKeyArray, batch: tuple[Array, Array]
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        del key
        features, shares = batch
        return pinball(self.levels, jax.vmap(network)(features), shares[:, None]).mean(), {}


def pinball(
    level: Float[Array, "*#N"], quantile: Float[Array, "*#N"], value: Float[Array, "*#N"]
) -> Float[Array, "..."]:
    """b max(0, p - r) + (1 - b) max(0, r - p): of level b, quantile r and value p."""
    return jnp.maximum(level * (value - quantile), (level - 1) * (value - quantile))


def training(
    key: PRNGKeyArray,
    features: Any,
    shares: Any,
    *,
    levels: Sequence[float] = (0.1, 0.5, 0.9),
    width: int = 32,
    depth: int = 1,
    batch_size: int = 200,
) -> Training:
    """What `fit.run` minimises to learn quantiles of a chance of success.

    Args:
        key: for the start of the network.
        features: [N, D] of prefixes: hidden states (`lm.features`), or a process reward's scores.
        shares: [N] of how many rollouts from each succeeded; in [0, 1].
        levels: of the quantiles, increasing, in (0, 1).
        width, depth: of the network.
        batch_size: rows to a step.

    Raises:
        ValueError: if a count is not positive, shapes differ, a number is not finite, a share is
            outside [0, 1], or levels are not increasing between 0 and 1.
    """
    check_key(key)
    check_counts(width=width, depth=depth, batch_size=batch_size)
    x, p, b = (np.asarray(values, np.float32) for values in (features, shares, levels))
    if x.ndim != 2 or p.shape != x.shape[:1] or not len(x) or not np.isfinite(x).all():
        raise ValueError(
            "expected finite features [N, D] and a share of successes for each row [N], got"
            f" {list(x.shape)} and {list(p.shape)}; leave out rows that are NaN"
        )
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError(
            f"expected shares of rollouts in [0, 1], got {p.min()} to {p.max()}; divide successes"
            " by rollouts"
        )
    if b.ndim != 1 or not len(b) or not (np.diff([0, *b, 1]) > 0).all():
        raise ValueError(
            f"expected increasing levels between 0 and 1, got {list(levels)}; pass (0.1, 0.5, 0.9)"
        )
    spread = x.std(axis=0)
    network = Quantiles(
        eqx.nn.MLP(x.shape[1], len(b), width, depth, jax.nn.gelu, key=key),
        NonTrainable(jnp.asarray(x.mean(axis=0))),
        NonTrainable(jnp.asarray(np.where(spread > 0, spread, 1))),
    )
    return Training(
        network, Rows((jnp.asarray(x), jnp.asarray(p)), batch_size), Loss(jnp.asarray(b))
    )


def quantiles(out: Fitted) -> Callable[[Float[Array, "N D"]], Float[Array, "N B"]]:
    """What a run has learned: features [N, D] -> quantiles [N, B] of the chance, compiled."""
    return eqx.Partial(_applied, out.best)


@eqx.filter_jit
def _applied(network: Quantiles, features: Float[Array, "N D"]) -> Float[Array, "N B"]:
    return jax.vmap(network)(features)
