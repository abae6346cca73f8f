"""Bounds on log Z from both sides: SMC from below, conditional SMC on exact draws from above.

    E[log Z-hat] = log Z - KL(psi | psi') <= log Z <= log Z + KL(psi' | psi) = E'[log Z-hat]

psi is the law of everything that a run of SMC draws, psi' that of conditional SMC on a draw from
gamma / Z.  This is bidirectional Monte Carlo (Grosse, Ghahramani and Adams, arXiv 1511.02543).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Unpack

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from ppl.checks import check_count, check_counts
from ppl.pytrees import register_dataclass
from ppl.rows import take_rows
from ppl.sequences import Sequences
from ppl.target import Target

from .. import kernels
from ..base import Cost, Guarantee
from ..registry import sampler
from ..strings import costs
from . import conditional
from . import sequential as smc


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Bounds:
    """E[lower] <= log Z <= E[upper], each a mean over independent runs with its standard error [].

    log_z_lower [K], log_z_upper [M]: the runs' estimates.  cost: of all runs together.
    """

    log_z_lower: Float[Array, " K"]
    log_z_upper: Float[Array, " M"]
    cost: Cost

    @property
    def lower(self) -> Float[Array, ""]:
        """-inf if all particles of a run were dead."""
        return self.log_z_lower.mean()

    @property
    def upper(self) -> Float[Array, ""]:
        return self.log_z_upper.mean()

    @property
    def gap(self) -> Float[Array, ""]:
        """upper - lower; in expectation the error of neither bound is greater."""
        return self.upper - self.lower

    @property
    def lower_std_error(self) -> Float[Array, ""]:
        return _std_error(self.log_z_lower)

    @property
    def upper_std_error(self) -> Float[Array, ""]:
        return _std_error(self.log_z_upper)

    @property
    def gap_std_error(self) -> Float[Array, ""]:
        return jnp.hypot(self.lower_std_error, self.upper_std_error)


def _std_error(values: Float[Array, " K"]) -> Float[Array, ""]:
    """Of their mean; infinite for one value, and where one is."""
    num = values.shape[0]
    if num == 1:
        return jnp.float32(jnp.inf)
    return jnp.where(jnp.isfinite(values).all(), values.std(ddof=1) / num**0.5, jnp.inf)


@sampler(Guarantee.EXACT, proof="tests/samplers/smc/test_bounds.py")
def run(
    key: PRNGKeyArray,
    target: Target,
    exact: Sequences,
    *,
    num_particles: int = 32,
    num_runs: int | None = None,
    batch_size: int = 1,
    **options: Unpack[smc.Options],
) -> Bounds:
    """Lower and upper bound on log Z, whose gap bounds the error of both.

    The expected gap is KL(psi | psi') + KL(psi' | psi), so it also says how far SMC's population is
    from one that holds an exact draw.  With one particle and threshold=0 the bounds are those of
    the proposal q alone,

        F(q) = E_q[log gamma / q],   G(q) = E_pi[log gamma / q],   G - F = KL(q | pi) + KL(pi | q).

    Exact draws of gamma / Z come from
      - rejection, if gamma <= p: draw from p (`ancestral`) and accept with probability gamma / p,
        as for a constraint;
      - enumeration of a small target: take rows of `ppl.enumerate_strings(target).sequences` by its
        `probs`;
      - simulated data: if the target is a posterior given y, draw (x, y) jointly and bound the
        evidence of that y; x is one exact draw (M = 1).
    A long chain gives draws that are nearly exact; the upper bound then is nearly one.

    Args:
        key: typed key.
        target: gamma.
        exact: M draws; conditional SMC runs once on each.
        num_particles: N of every run.
        num_runs: K runs of SMC; by default as many as there are draws.
        batch_size: runs at a time.
        options: as in `smc.run`, except `resampler`, which is multinomial on both sides.

    Raises:
        ValueError: if `exact` holds no strings of the target, or a resampler is given.
    """
    target.space.check(exact)
    check_count("the number of exact draws", exact.length.shape[0])
    num_runs = exact.length.shape[0] if num_runs is None else num_runs
    check_counts(num_runs=num_runs, batch_size=batch_size)
    how = conditional.bind(target, num_particles, False, options)
    fresh = conditional.fresh(target, how, num_particles)
    around = conditional.around(target, how, num_particles)
    prompt = costs.prompt(target, how.proposal)
    return _run(key, fresh, around, exact, prompt, num_runs, batch_size)


@functools.partial(jax.jit, static_argnums=(5, 6))
def _run(
    key: Any,
    fresh: kernels.Sampler,
    around: kernels.Sampler,
    exact: Sequences,
    prompt: Cost,
    num_runs: int,
    batch_size: int,
) -> Bounds:
    lower_key, upper_key = jax.random.split(key)
    # What strings a run without a reference is given does not matter.
    given = take_rows(exact, jnp.zeros(num_runs, jnp.int32))
    _, lower, below = kernels.one_of_each(lower_key, fresh, given, batch_size=batch_size)
    _, upper, above = kernels.one_of_each(upper_key, around, exact, batch_size=batch_size)
    return Bounds(lower, upper, prompt + (below["cost"].total() | above["cost"].total()))
