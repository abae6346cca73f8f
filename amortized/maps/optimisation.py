"""Amortized optimisation: a network that gives the solution of a problem (Amos 2022,
arXiv 2202.00665).

    training = optimisation.objective(network, f, rows)         # E f(network(x), x)
    training = optimisation.regression(network, rows, solved)   # E |network(x) - y*(x)|^2 / 2
    y = optimisation.refined(f, network(x), x, num_steps=5, rate=0.1)

Both losses have the same optimum, y*(x) = argmin_y f(y, x), if the network can give it.  Near it
their gradients differ by the curvature of f: on f = y'Qy / 2 - b'y it is Q (y - y*) for the
objective and y - y* for the regression, so that the objective cares for what costs most, and needs
no solutions.  k steps of gradient descent after the network multiply its error by (I - rate Q)^k;
with `num_steps` the objective is learned through them, which is then what the network is a start
for.
"""

from __future__ import annotations

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from ppl.checks import check_counts

from ..training import Rows, Training

Function = Callable[[Float[Array, " D"], PyTree], Float[Array, ""]]
"""(y, x) -> what is to be small in y; x is the problem."""

Network = Callable[[PyTree], Float[Array, " D"]]
"""x -> y."""


def refined(
    f: Function, y: Float[Array, " D"], x: PyTree, *, num_steps: int, rate: float
) -> Float[Array, " D"]:
    """y after so many steps of gradient descent on f(., x); differentiable in y and x."""

    def step(y: Array, _: None) -> tuple[Array, None]:
        return y - (rate * jax.grad(f)(y, x)).astype(y.dtype), None

    y, _ = jax.lax.scan(step, y, None, num_steps)
    return y


class Objective(eqx.Module):
    """f at the network's answer, after `num_steps` of gradient descent, the mean over a batch."""

    f: Function
    rate: float = eqx.field(static=True)
    num_steps: int = eqx.field(static=True)

    def __call__(
        self, network: Network, key: PRNGKeyArray, batch: PyTree
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        del key

        def one(x: PyTree) -> Array:
            y = refined(self.f, network(x), x, num_steps=self.num_steps, rate=self.rate)
            return self.f(y, x)

        return jax.vmap(one)(batch).mean(), {}


class Regression(eqx.Module):
    """Half the squared distance to the solution, the mean over a batch of (x, y*)."""

    def __call__(
        self, network: Network, key: PRNGKeyArray, batch: tuple[PyTree, Float[Array, "B D"]]
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        del key
        x, solved = batch
        return jnp.sum((jax.vmap(network)(x) - solved) ** 2, 1).mean() / 2, {}


def objective(
    network: Network,
    f: Function,
    rows: PyTree,
    *,
    num_steps: int = 0,
    rate: float = 0.1,
    batch_size: int = 64,
) -> Training:
    """What `fit.run` minimises to solve problems without solutions.

    Args:
        network: x -> y, as it starts.
        f: (y, x) -> a number.
        rows: problems, N rows of every leaf.
        num_steps: of gradient descent from the network's answer, learned through; 0 for none.
        rate: theirs; it must be below 2 over the largest curvature of f.
        batch_size: problems to a step.

    Raises:
        ValueError: if the batch size is not positive, num_steps is negative, or f is no scalar.
    """
    check_counts(batch_size=batch_size)
    if num_steps < 0:
        raise ValueError(f"expected num_steps of at least 0, got {num_steps}")
    first = jax.tree.map(lambda leaf: leaf[0], rows)
    found = eqx.filter_eval_shape(lambda x: f(network(x), x), first)
    if found.shape != ():
        raise ValueError(f"expected a scalar of f(y, x), got shape {found.shape}; sum it")
    return Training(network, Rows(rows, batch_size), Objective(f, float(rate), num_steps))


def regression(
    network: Network, rows: PyTree, solved: Float[Array, "N D"], *, batch_size: int = 64
) -> Training:
    """What `fit.run` minimises to learn solutions that are known.

    Args:
        network: x -> y, as it starts.
        rows: problems, N rows of every leaf.
        solved: their solutions.
        batch_size: problems to a step.

    Raises:
        ValueError: if the batch size is not positive, or solutions are not those of the problems.
    """
    check_counts(batch_size=batch_size)
    first = jax.tree.map(lambda leaf: leaf[0], rows)
    found, num = eqx.filter_eval_shape(network, first), len(jax.tree.leaves(rows)[0])
    if solved.shape != (num, *found.shape):
        raise ValueError(
            f"expected a solution for each problem, {(num, *found.shape)}, got {solved.shape}"
        )
    return Training(network, Rows((rows, solved), batch_size), Regression())
