"""Targets small enough to enumerate, their densities written a second time in plain Python, and the
check of LAW 1.

A problem is how to tilt p, and what Phi is for a string; nothing of ppl is used to compute the
truth.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import ppl
from ppl import automata
from ppl.pytrees import as_pytree
from ppl.target import Target
from samplers import base, population, resampling, smc
from samplers.strings import growing, proposals, selection
from tests import helpers
from tests.helpers import EOS, MAX_TOKENS, MODELS, PROMPT, VOCAB_SIZE, String

RESAMPLERS = {
    "multinomial": resampling.multinomial,
    "stratified": resampling.stratified,
    "systematic": resampling.systematic,
    "residual": resampling.residual,
    "ssp": resampling.ssp,
    "killing": resampling.killing,
}
SOME_RESAMPLERS = {name: RESAMPLERS[name] for name in ("multinomial", "systematic", "killing")}
"""Coarse, even, and one that leaves particles in their places.  What each resampler draws is tested
by itself.
"""
PROPOSALS = {
    "bootstrap": proposals.bootstrap,
    "tempered": proposals.tempered(1.3),
    "locally_optimal": proposals.locally_optimal,
}
SELECTIONS = {
    "by_weight": selection.by_weight,
    "annealed": selection.annealed(2.0),
    "entropic": selection.entropic(MAX_TOKENS),
    "next_token": selection.next_token,
}
THRESHOLDS = (0.0, 0.5, 1.1)
NUM_PARTICLES = 4
TOKEN_BYTES = (b"a", None, b"b", b"ab")
PATTERN = r"(ab)*a?b?|a(b|aba)+"
SECOND_PROMPT = (3, 0, 2)


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """What `ppl.regex` asks of a tokenizer."""

    token_bytes: tuple[bytes | None, ...] = TOKEN_BYTES
    eos: int = EOS
    vocab_size: int = VOCAB_SIZE


@dataclasses.dataclass(frozen=True)
class Problem:
    """gamma(x) = p(x)^alpha phi(x): `build` makes the target from p, `phi` is one string's Phi, by
    other means.
    """

    build: Callable[[Target], Target]
    phi: Callable[[String], float]
    alpha: float = 1.0


def score(x: String) -> float:
    """A log-score of a string or prefix: asymmetric in tokens, positions and length, 0 for the
    empty one.
    """
    return (
        0.5 * x.count(0)
        - 0.4 * x.count(2)
        + 0.3 * (len(x) % 2)
        - 0.35 * (x[-1:] == (3,))
        + 0.2 * (x[:1] == (3,))
    )


def score_arrays(tokens: Any, length: Any) -> Any:
    """`score` of rows."""
    written = jnp.arange(tokens.shape[1]) < length[:, None]
    last = jnp.take_along_axis(tokens, jnp.maximum(length - 1, 0)[:, None], axis=1)[:, 0]
    value = (
        0.5 * (written & (tokens == 0)).sum(1)
        - 0.4 * (written & (tokens == 2)).sum(1)
        + 0.3 * (length % 2)
    )
    return value + jnp.where(length > 0, -0.35 * (last == 3) + 0.2 * (tokens[:, 0] == 3), 0.0)


def strict_arrays(tokens: Any, length: Any) -> Any:
    """`score_arrays`, except that prefixes of two tokens that end in 0 are forbidden."""
    return jnp.where((length == 2) & (tokens[:, 1] == 0), -jnp.inf, score_arrays(tokens, length))


def strict_phi(x: String) -> float:
    """A boundary after every second token; a string that once had no mass never has any."""
    return 0.0 if len(x) >= 2 and x[1] == 0 else math.exp(score(x))


@functools.cache
def second_law() -> dict[String, float]:
    return helpers.brute_force_law(helpers.hmm(), SECOND_PROMPT, MAX_TOKENS)[0]


def second(p: Target) -> Target:
    return helpers.hmm().given(SECOND_PROMPT, max_tokens=p.max_tokens)


def _matches(x: String) -> float:
    return float(
        re.fullmatch(PATTERN.encode(), b"".join(TOKEN_BYTES[v] or b"" for v in x)) is not None
    )


PROBLEMS: dict[str, Problem] = {
    "plain": Problem(lambda p: p, lambda x: 1.0),
    "power": Problem(lambda p: p**1.7, lambda x: 1.0, alpha=1.7),
    "banned": Problem(lambda p: p**0.6 * ppl.banned([2]), lambda x: float(2 not in x), alpha=0.6),
    "forced": Problem(lambda p: p * ppl.forced([3]), lambda x: float(x[:1] == (3,))),
    "must_end": Problem(lambda p: p * ppl.must_end(), lambda x: float(len(x) < MAX_TOKENS)),
    "min_tokens": Problem(lambda p: ppl.min_tokens(2) * p, lambda x: float(len(x) >= 2)),
    "reward": Problem(lambda p: p * ppl.reward(score_arrays), lambda x: math.exp(score(x))),
    "delimiters": Problem(
        lambda p: p * ppl.step_scores(score_arrays, ppl.Steps(delimiters=[3, 2])),
        lambda x: math.exp(score(x)),
    ),
    "every_1": Problem(
        lambda p: p**1.3 * ppl.step_scores(score_arrays, ppl.Steps(every=1)),
        lambda x: math.exp(score(x)),
        1.3,
    ),
    "every_2": Problem(
        lambda p: p * ppl.step_scores(strict_arrays, ppl.Steps(every=2)), strict_phi
    ),
    "every_3": Problem(
        lambda p: p * ppl.step_scores(score_arrays, ppl.Steps(every=3)),
        lambda x: math.exp(score(x)),
    ),
    "every_4": Problem(
        lambda p: p * ppl.step_scores(score_arrays, ppl.Steps(every=4)),
        lambda x: math.exp(score(x)),
    ),
    "second_lm": Problem(lambda p: p * second(p), lambda x: second_law().get(x, 0.0)),
    "power_of_potential": Problem(
        lambda p: p * (ppl.reward(score_arrays) * ppl.banned([0])) ** 0.5,
        lambda x: math.exp(0.5 * score(x)) * (0 not in x),
    ),
    "product": Problem(
        lambda p: (
            p**1.2
            * ppl.must_end()
            * ppl.min_tokens(1)
            * ppl.step_scores(score_arrays, ppl.Steps(every=1))
        ),
        lambda x: math.exp(score(x)) * (1 <= len(x) < MAX_TOKENS),
        alpha=1.2,
    ),
    "power_of_all": Problem(
        lambda p: (p * (second(p) ** 0.5) * ppl.must_end()) ** 0.8,
        lambda x: second_law().get(x, 0.0) ** 0.4 * (len(x) < MAX_TOKENS),
        alpha=0.8,
    ),
    "regex": Problem(lambda p: p * automata.regex(PATTERN, Tokenizer()), _matches),
}


def plain(model: str) -> Target:
    return MODELS[model]().given(PROMPT, max_tokens=MAX_TOKENS)


def target_of(model: str, problem: str) -> Target:
    return PROBLEMS[problem].build(plain(model))


@functools.cache
def _model_law(model: str) -> dict[String, float]:
    return helpers.brute_force_law(MODELS[model](), PROMPT, MAX_TOKENS)[0]


@functools.cache
def gamma(model: str, problem: str) -> dict[String, float]:
    """gamma(x) of every string of positive mass, by brute force."""
    of = PROBLEMS[problem]
    values = {x: p**of.alpha * of.phi(x) for x, p in _model_law(model).items()}
    return {x: value for x, value in values.items() if value > 0}


# LAW 1.


def code(tokens: Any) -> Any:
    """One number per string [..., T]: its tokens, padded with EOS, as digits."""
    return (tokens * VOCAB_SIZE ** np.arange(MAX_TOKENS)).sum(-1)


def dense(law: dict[String, float]) -> np.ndarray:
    """A law as an array over codes."""
    values = np.zeros(VOCAB_SIZE**MAX_TOKENS)
    tokens, _ = helpers.as_arrays(list(law), MAX_TOKENS, EOS)
    values[code(np.asarray(tokens))] = list(law.values())
    return values


def mass(out: Any) -> jax.Array:
    """exp(log_z) mean_i exp(w_i) 1{x_i = x} for every x: what LAW 1 is about."""
    weights = jnp.exp(out.log_z) * jnp.exp(out.log_weights) / out.log_weights.shape[0]
    return jnp.zeros(VOCAB_SIZE**MAX_TOKENS).at[code(out.sequences.tokens)].add(weights)


def masses(run: Callable[..., Any], keys: Any, *args: Any) -> np.ndarray:
    """`mass` of `run(key, *args)` for every key (and row of args) [R, codes]."""
    many = jax.jit(jax.vmap(lambda *row: mass(run(*row))))
    return np.asarray(many(keys, *args), np.float64)


def smc_masses(
    key: Any, target: Target, num: int, thresholds: tuple[float, ...] = THRESHOLDS, **options: Any
) -> dict[float, np.ndarray]:
    """`mass` of `num` runs of SMC at each threshold: {threshold: [num, codes]}."""
    keys = jax.random.split(key, num * len(thresholds))
    rows = jnp.tile(jnp.asarray(thresholds, jnp.float32), num)
    options = {"num_particles": NUM_PARTICLES, **options}
    found = masses(
        lambda k, threshold: smc.run(k, target, threshold=threshold, **options), keys, rows
    )
    return {threshold: found[i :: len(thresholds)] for i, threshold in enumerate(thresholds)}


def all_masses(key: Any, target: Target, num: int) -> dict[tuple[str, str, str, float], np.ndarray]:
    """`mass` of `num` runs at every threshold with ways of going on, in which every two of a
    proposal, a resampler and a selection meet; choices are data, so all compile once."""

    def propose(which: Any, target: Target, *args: Any) -> Any:
        branches = [lambda operands, f=f: f(target, *operands) for f in PROPOSALS.values()]
        return jax.lax.switch(which, branches, args)

    def select(which: Any, key: Any, target: Target, p: Any, round: Any) -> Any:
        # One forward pass for all: `next_token` needs it, and for the others it is the move's.
        x, logits = growing.forward(target, p.state)
        p = dataclasses.replace(p, state=dataclasses.replace(x, logits=logits))

        def log_probs(f: Any, p: Any) -> Any:
            of = f(key, target, p, round)[1]
            return p.log_weights if of is None else of

        branches = [functools.partial(log_probs, as_pytree(f)) for f in SELECTIONS.values()]
        return p, jax.lax.switch(which, branches, p), base.Cost()

    def run(how: Any, resampler: Any, key: Any, threshold: Any) -> jax.Array:
        def resample(key: Any, log_weights: Any, num: int) -> Any:
            branches = [lambda operands, f=f: f(*operands, num) for f in SOME_RESAMPLERS.values()]
            return jax.lax.switch(resampler, branches, (key, log_weights))

        proposal, selection = how
        return mass(
            smc.run(
                key,
                target,
                num_particles=NUM_PARTICLES,
                proposal=jax.tree_util.Partial(propose, proposal),
                selection=jax.tree_util.Partial(select, selection),
                resampler=resample,
                threshold=threshold,
            )
        )

    many = jax.jit(jax.vmap(run, in_axes=(None, None, 0, 0)))
    thresholds = jnp.repeat(jnp.asarray(THRESHOLDS, jnp.float32), num)
    found, ways = (
        {},
        [
            ((i, proposal), (j, resampler), (k, chosen))
            for (i, proposal), (j, resampler), (k, chosen) in itertools.product(
                enumerate(PROPOSALS), enumerate(SOME_RESAMPLERS), enumerate(SELECTIONS)
            )
            if (i + j + k) % len(PROPOSALS) == 0
        ],
    )
    for way_key, ((i, proposal), (j, resampler), (k, chosen)) in zip(
        jax.random.split(key, len(ways)), ways, strict=True
    ):
        keys = jax.random.split(way_key, len(thresholds))
        rows = np.asarray(
            many((jnp.int32(i), jnp.int32(k)), jnp.int32(j), keys, thresholds), np.float64
        )
        parts = zip(THRESHOLDS, np.split(rows, 3), strict=True)
        found |= {(proposal, resampler, chosen, threshold): part for threshold, part in parts}
    return found


MIN_COUNT = 60


def check_law(found: np.ndarray, truth: dict[String, float], *, resolution: float) -> None:
    """Assert LAW 1 for the total (E[Z-hat] = Z) and every string; `found` [R, codes] are
    independent runs' masses.

    A string that few runs found has no normal mean: such strings are added up and tested together.
    `resolution` bounds the standard error of Z-hat / Z.
    """
    expected = dense(truth)
    total = expected.sum()
    helpers.assert_z(found.sum(1), total, resolution=resolution * total)
    mean, second_moment = found.mean(0), (found**2).mean(0)
    wrong = np.flatnonzero((expected == 0) & (mean > 0))
    assert not wrong.size, f"z = inf: strings of mass 0 were drawn, the first has code {wrong[0]}"
    most = found.sum(1).max()  # what one run can weigh, about
    count = len(found) * np.maximum(mean**2 / np.maximum(second_moment, 1e-30), expected / most)
    common = (count >= MIN_COUNT) & (expected >= 1e-3 * total)
    for x in np.flatnonzero(common):
        z, _ = helpers.z_score(found[:, x] / expected[x], 1.0)
        assert abs(z) < 5, f"z = {z:.2f} of string {x}: {mean[x]:.5g}, truth {expected[x]:.5g}"
    if (rare := (expected > 0) & ~common).any():
        z, _ = helpers.z_score(found[:, rare].sum(1) / expected[rare].sum(), 1.0)
        assert abs(z) < 5, f"z = {z:.2f} of the {rare.sum()} rare strings together"
    error = np.sqrt(np.maximum(second_moment - mean**2, 0) / len(found)) / total
    variation = 0.5 * np.abs(mean / total - expected / total).sum()
    bound = 0.4 * error.sum() + 2.5 * np.sqrt(
        (error**2).sum()
    )  # half of E|N(0, 1)| = 0.8, and five deviations
    assert variation < bound, f"z: total variation {variation:.4f}, {bound:.4f} is noise"


def applied(key: Any, p: base.Particles, move: base.Move) -> base.Particles:
    """The population after a move: properly weighted for the next target, by LAW 2."""
    return population.advance(key, population.start(p), move).particles
