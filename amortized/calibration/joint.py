"""What every check starts from: parameters, what they generated, and posterior draws for each.

    theta_i ~ prior,    x_i ~ p(x | theta_i),    draws_i1, ..., draws_iS ~ q(theta | x_i)

If q is the posterior, theta_i and its draws are exchangeable given x_i.  The checks ask whether
they are.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Bool, Float, PRNGKeyArray, PyTree

from ppl.checks import check_counts, check_function, check_key
from ppl.pytrees import as_pytree
from ppl.showing import shown

from ..interrupts import Interrupts
from ..progress import Count

Simulate = Callable[[PRNGKeyArray], tuple[Any, Any]]
"""key -> (theta, x): a draw of the prior, and what it generates; both any pytrees of arrays."""

Sampler = Callable[[PRNGKeyArray, Any, int], Any]
"""(key, x, num_samples) -> draws: like theta, with an axis S in front of every leaf; equally
weighted.
"""

Quantity = Callable[[Any, Any], dict[str, Any]]
"""(theta, x) -> numbers [] by name, of one theta and one x; jax functions."""


@shown
class Columns(NamedTuple):
    """Numbers of the true parameters and of their draws, by name.

    truth [N, K], draws [N, S, K]; float64.
    """

    truth: Float[np.ndarray, "N K"]
    draws: Float[np.ndarray, "N S K"]
    names: tuple[str, ...]


@shown
@dataclasses.dataclass(frozen=True)
class Joint:
    """Simulations and posterior draws for each, on the host.

    Simulations in which a number is NaN or infinite are left out, which is said in a warning and
    counted in `left_out`: what a check then says holds for the others.

    Attributes:
        theta: what was drawn from the prior: an array [N, D], or any pytree with leaves [N, ...],
            as latents by name.
        x: what it generated; leaves [N, ...].
        draws: posterior draws, like `theta`, leaves [N, S, ...].
        left_out: simulations that are not here, by what was not finite in them.

    Raises:
        ValueError: if the shapes do not fit each other, or no simulation is finite.
    """

    theta: PyTree
    x: PyTree
    draws: PyTree
    left_out: dict[str, int] = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        theta, x, draws = (
            jax.tree.map(np.asarray, jax.device_get(part))
            for part in (self.theta, self.x, self.draws)
        )
        _check_shapes(theta, x, draws)
        bad = {
            f"{part}{name}": ~finite_rows(leaf)
            for part, tree in (("theta", theta), ("x", x), ("draws", draws))
            for name, leaf in named_leaves(tree)
        }
        wrong = functools.reduce(np.logical_or, bad.values())
        counts = {name: int(rows.sum()) for name, rows in bad.items() if rows.any()}
        if counts:
            _say_not_finite(counts, wrong)
        object.__setattr__(self, "left_out", counts)
        for name, tree in (("theta", theta), ("x", x), ("draws", draws)):
            kept = jax.tree.map(lambda leaf: leaf[~wrong], tree) if counts else tree
            object.__setattr__(self, name, kept)

    @property
    def num_simulations(self) -> int:
        """N, those that were left out not counted."""
        return jax.tree.leaves(self.theta)[0].shape[0]

    @property
    def num_samples(self) -> int:
        """S."""
        return jax.tree.leaves(self.draws)[0].shape[1]

    def _shown_(self) -> dict[str, Any]:
        fields = dataclasses.fields(self)
        sizes = {"num_simulations": self.num_simulations, "num_samples": self.num_samples}
        return sizes | {field.name: getattr(self, field.name) for field in fields}


def draw(
    key: PRNGKeyArray,
    simulate: Simulate,
    sampler: Sampler,
    *,
    num_simulations: int,
    num_samples: int,
    batch_size: int = 64,
) -> Joint:
    """Simulate, and draw the posterior of every simulation: compiled, `batch_size` of them side by
    side.

    Simulation i has key i of split(key, N), so that more of them keep those that there were.  After
    an interrupt (Ctrl-C) there is what was made by then.  A bar appears after two seconds.

    Args:
        key: typed key.
        simulate: key -> (theta, x), one draw of the joint law; traced.
        sampler: (key, x, num_samples) -> draws [S, ...], equally weighted, as independent as the
            checks are to be exact; traced.  What does not trace, `draw_each` takes.
        num_simulations: N.
        num_samples: S; S + 1 that has many divisors, as 199, makes bins of equal size.
        batch_size: simulations that run side by side.

    Raises:
        ValueError: if a count is below 1, what simulator and sampler give does not fit each
            other, or nothing of it is finite.
    """
    check_counts(batch_size=batch_size)
    program = _batch(as_pytree(simulate), as_pytree(sampler), num_samples)
    return _collected(key, program, (simulate, sampler), (num_simulations, num_samples), batch_size)


def draw_each(
    key: PRNGKeyArray,
    simulate: Simulate,
    sampler: Sampler,
    *,
    num_simulations: int,
    num_samples: int,
) -> Joint:
    """`draw` by plain Python functions, one simulation after another: for simulators and samplers
    that jax cannot trace.
    """

    def one(keys: Any) -> Any:
        simulation_key, sampler_key = jax.random.split(keys[0])
        theta, x = simulate(simulation_key)
        rows = theta, x, sampler(sampler_key, x, num_samples)
        return jax.tree.map(lambda leaf: np.asarray(leaf)[None], rows)

    return _collected(key, one, (simulate, sampler), (num_simulations, num_samples), 1)


def _batch(simulate: Any, sampler: Any, num_samples: int) -> Callable[[Any], Any]:
    return functools.partial(_simulations, simulate, sampler, num_samples=num_samples)


@eqx.filter_jit  # networks hold functions beside their arrays
def _simulations(simulate: Any, sampler: Any, keys: Any, *, num_samples: int) -> Any:
    def one(key: PRNGKeyArray) -> Any:
        simulation_key, sampler_key = jax.random.split(key)
        theta, x = simulate(simulation_key)
        return theta, x, sampler(sampler_key, x, num_samples)

    return jax.vmap(one)(keys)


def _collected(
    key: PRNGKeyArray,
    program: Callable[[Any], Any],
    functions: tuple[Simulate, Sampler],
    sizes: tuple[int, int],
    batch_size: int,
) -> Joint:
    """All simulations, a batch after the other."""
    check_key(key)
    check_counts(num_simulations=sizes[0], num_samples=sizes[1])
    check_function("simulate", functions[0], "(key)", "your simulator")
    check_function("sampler", functions[1], "(key, x, num_samples)", "your sampler")
    num, found = sizes[0], []
    batch_size = min(batch_size, num)
    with Count("simulations", num) as bar, Interrupts() as interrupts:
        keys = jax.random.split(key, -(-num // batch_size) * batch_size)
        for start in range(0, num, batch_size):
            found.append(jax.device_get(program(keys[start : start + batch_size])))
            bar.show(min(start + batch_size, num))
            if interrupts.asked:
                break
    made = min(len(found) * batch_size, num)
    if made < num:
        warnings.warn(f"interrupted after {made} of {num} simulations", stacklevel=3)
    theta, x, draws = jax.tree.map(lambda *leaves: np.concatenate(leaves)[:num], *found)
    return Joint(theta, x, draws)


# Numbers of them.


def coordinates(joint: Joint) -> Columns:
    """Every number of theta as a column; those of an array are "theta[0]", "theta[1]", ..., of a
    tree "mu", "w[0]", "w[1]", ...
    """
    truth, draws, names = [], [], []
    num, samples = joint.num_simulations, joint.num_samples
    leaves = zip(named_leaves(joint.theta), jax.tree.leaves(joint.draws), strict=True)
    for (name, theta), of in leaves:
        truth.append(theta.reshape(num, -1))
        draws.append(of.reshape(num, samples, -1))
        name = name.lstrip(".") or "theta"
        at = np.ndindex(theta.shape[1:])
        names += [name + (f"[{','.join(map(str, i))}]" if i else "") for i in at]
    truth, draws = (np.concatenate(part, axis=-1).astype(np.float64) for part in (truth, draws))
    return Columns(truth, draws, tuple(names))


def evaluate(joint: Joint, quantity: Quantity, *, batch_size: int = 64) -> Columns:
    """Quantities of theta and x, for the true parameters and for all draws.

    Args:
        quantity: (theta, x) -> {name: number []}, traced; of one theta and one x.
        batch_size: simulations side by side; S + 1 evaluations for each.

    Raises:
        ValueError: if it does not give numbers by name, or one is NaN (infinite ones have a rank).
    """
    values = _evaluated(as_pytree(quantity), joint.theta, joint.x, joint.draws, batch_size)
    truth, draws, names = [], [], tuple(values)
    for name, (of_truth, of_draws) in values.items():
        truth.append(np.asarray(of_truth, np.float64))
        draws.append(np.asarray(of_draws, np.float64))
        count = int(np.isnan(truth[-1]).sum() + np.isnan(draws[-1]).sum())
        if count:
            raise ValueError(
                f"expected quantities that can be ranked, got {name!r}, which is NaN {count} times;"
                " let it be finite or infinite for all draws of the sampler, e.g. by jnp.where"
            )
    return Columns(np.stack(truth, -1), np.stack(draws, -1), names)


@eqx.filter_jit
def _evaluated(quantity: Any, theta: Any, x: Any, draws: Any, batch_size: int) -> Any:
    def checked(theta: Any, x: Any) -> dict[str, Any]:
        values = quantity(theta, x)
        if not isinstance(values, dict) or not values or any(map(np.ndim, values.values())):
            got = {name: np.shape(v) for name, v in values.items()} if values else values
            raise ValueError(
                "expected a quantity to give numbers [] by name, got"
                f" {got if isinstance(values, dict) else type(values).__name__};"
                ' write e.g. lambda theta, x: {"norm": jnp.sum(theta**2)}'
            )
        return values

    def one(row: Any) -> Any:
        truth, x, draws = row
        many = jax.vmap(checked, in_axes=(0, None))(draws, x)
        return {name: (value, many[name]) for name, value in checked(truth, x).items()}

    return jax.lax.map(one, (theta, x, draws), batch_size=batch_size)


def flattened(x: PyTree) -> Float[np.ndarray, "N P"]:
    """All numbers of observations, a row for each."""
    rows = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(x)]
    return np.concatenate([row.reshape(row.shape[0], -1) for row in rows], axis=1)


def standardised(
    rows: Float[np.ndarray, "*S P"], by: Float[np.ndarray, "N P"]
) -> Float[np.ndarray, "*S P"]:
    """Columns in units of the spread of those of `by`; a column without spread is centred only."""
    scale = by.std(axis=0)
    return (rows - by.mean(axis=0)) / np.where(scale > 0, scale, 1.0)


# Shapes.


def named_leaves(tree: PyTree) -> Iterator[tuple[str, np.ndarray]]:
    """The leaves of a tree by their paths: ".mu"; of an array the name is empty."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        parts = [str(getattr(p, "key", getattr(p, "name", getattr(p, "idx", p)))) for p in path]
        yield "".join(f".{part}" for part in parts), leaf


def finite_rows(tree: PyTree) -> Bool[np.ndarray, " N"]:
    """Which rows are finite in all leaves."""
    good = [
        np.isfinite(np.asarray(leaf, np.float64)).reshape(np.shape(leaf)[0], -1).all(axis=1)
        for leaf in jax.tree.leaves(tree)
    ]
    return np.logical_and.reduce(good)


def _say_not_finite(counts: dict[str, int], wrong: Bool[np.ndarray, " N"]) -> None:
    where = ", ".join(f"{name}: {count}" for name, count in counts.items())
    if wrong.all():
        raise ValueError(
            f"expected simulations with finite numbers, got none in {len(wrong)} ({where}); look at"
            " simulate(key) and at sampler(key, x, num_samples) for one key"
        )
    warnings.warn(
        f"{wrong.sum()} of {len(wrong)} simulations have numbers that are NaN or infinite"
        f" ({where}); they are left out of all checks, which then say nothing about them",
        stacklevel=4,
    )


def _check_shapes(theta: PyTree, x: PyTree, draws: PyTree) -> None:
    shapes = [
        {f"{part}{name}": leaf.shape for name, leaf in named_leaves(tree)}
        for part, tree in (("theta", theta), ("x", x), ("draws", draws))
    ]
    leaves = jax.tree.leaves(theta)
    first = next((leaf.shape for leaf in jax.tree.leaves(draws)), ())
    fit = (
        bool(leaves)
        and bool(jax.tree.leaves(x))
        and jax.tree.structure(theta) == jax.tree.structure(draws)
        and len(first) >= 2
        and all(
            of.shape == (*first[:2], *one.shape[1:])
            for one, of in zip(leaves, jax.tree.leaves(draws), strict=True)
        )
        and all(leaf.shape[:1] == first[:1] for leaf in [*leaves, *jax.tree.leaves(x)])
    )
    if not fit or 0 in first[:2]:
        raise ValueError(
            "expected theta [N, ...], x [N, ...], and draws like theta with S draws for each,"
            f" [N, S, ...], got {shapes[0]}, {shapes[1]} and {shapes[2]}; the sampler gives the S"
            " draws of one x as [S, ...]"
        )
