"""SMC is exact: E[Z-hat] = Z and LAW 1 for every string, against densities computed by brute force."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ppl
from samplers import diagnostics, proposals, smc
from tests.helpers import EOS, MODELS, PROMPT, TraceCounter
from tests.samplers import problems
from tests.samplers.problems import (
    PROBLEMS,
    PROPOSALS,
    RESAMPLERS,
    THRESHOLDS,
    check_law,
    gamma,
    mass,
    smc_masses,
    target_of,
)

SLOW = ("plain", "every_3", "every_4", "power_of_potential", "power_of_all")
FAST = [problem for problem in PROBLEMS if problem not in SLOW]
# Every pair of model, proposal and resampler, each row at every threshold; `test_law_1_full_product` has the rest.
ROWS = [
    (problem, list(MODELS)[(2, 1, 0, 1, 0, 2, 0, 2, 1, 0, 1, 2)[i]], list(PROPOSALS)[i % 3], list(RESAMPLERS)[i // 3])
    for i, problem in enumerate(FAST)
]


def test_rows_cover_all_pairs():
    sides = [list(MODELS), list(PROPOSALS), list(RESAMPLERS)]
    for (i, a), (j, b) in itertools.combinations(enumerate(sides, 1), 2):
        assert {(row[i], row[j]) for row in ROWS} == set(itertools.product(a, b))


@pytest.mark.parametrize(("problem", "model", "proposal", "resampler"), ROWS)
def test_law_1(problem: str, model: str, proposal: str, resampler: str):
    found = smc_masses(
        jax.random.key(1),
        target_of(model, problem),
        15_000,
        proposal=PROPOSALS[proposal],
        resampler=RESAMPLERS[resampler],
    )
    for runs in found.values():
        check_law(runs, gamma(model, problem), resolution=0.008)


# What holds besides: the same numbers however it is run, and an honest account of what happened.


@pytest.mark.slow
@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("model", MODELS)
def test_law_1_full_product(model: str, problem: str):
    """Every model, potential, proposal, resampler and threshold; the choices are data, so each pair compiles once."""
    choices = list(itertools.product(PROPOSALS.values(), RESAMPLERS.values()))

    def choose(index: Any, which: int, *args: Any) -> Any:
        branches = [lambda operands, f=pair[which]: f(*operands, *rest) for pair in choices]
        operands, rest = (args[:2], args[2:]) if which else (args, ())
        return jax.lax.switch(index, branches, operands)

    def run(index: Any, key: Any, threshold: Any) -> Any:
        return smc.run(
            key,
            target,
            num_particles=5,
            threshold=threshold,
            proposal=jax.tree_util.Partial(lambda i, *args: choose(i, 0, *args), index),
            resampler=lambda *args: choose(index, 1, *args),
        )

    target, num = target_of(model, problem), 8_000 if problem == "second_lm" else 4_000
    many = jax.vmap(lambda *row: mass(run(*row)), in_axes=(None, 0, 0))
    thresholds = jnp.repeat(jnp.asarray(THRESHOLDS), num)
    options = [(i, key) for i, key in enumerate(jax.random.split(jax.random.key(3), len(choices)))]
    compiled = jax.jit(many)
    for i, key in options:
        found = np.asarray(compiled(jnp.int32(i), jax.random.split(key, len(thresholds)), thresholds), np.float64)
        for runs in np.split(found, len(THRESHOLDS)):
            check_law(runs, gamma(model, problem), resolution=0.02)


@pytest.mark.parametrize("problem", ["every_1", "product", "power_of_all"])
def test_optimal_twists_have_no_variance(problem: str):
    """Every weight is 1 and log_z exact, at every threshold and resampler, with 3 particles (Z by brute force)."""
    target = ppl.exact.optimal_twists(target_of("table", problem))
    log_z = np.log(sum(gamma("table", problem).values()))
    keys, thresholds = jax.random.split(jax.random.key(4), 60), jnp.tile(jnp.asarray(THRESHOLDS), 20)
    out = jax.vmap(lambda key, threshold: smc.run(key, target, num_particles=3, threshold=threshold))(keys, thresholds)
    np.testing.assert_allclose(out.log_weights, 0.0, atol=1e-5)
    np.testing.assert_allclose(out.log_z, log_z, atol=1e-5)
    assert (out.log_z_std_error < 1e-4).all()


def assert_same(a: Any, b: Any) -> None:
    """Equal strings and counts; floats up to rounding (another compilation may fuse differently)."""
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if jnp.issubdtype(x.dtype, jnp.floating):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)
        else:
            np.testing.assert_array_equal(x, y)


@pytest.fixture(scope="module")
def small() -> Any:
    """One problem, its key and a run that most of the tests below compare with."""
    target, key = target_of("table", "every_1"), jax.random.key(5)
    return target, key, smc.run(key, target, num_particles=6, threshold=0.9, history=True)


def test_the_same_key_gives_the_same_bits(small: Any):
    target, key, out = small
    again = smc.run(key, target, num_particles=6, threshold=0.9, history=True)
    jax.tree.map(np.testing.assert_array_equal, out, again)
    other = smc.run(jax.random.key(6), target, num_particles=6, threshold=0.9, history=True)
    assert (out.sequences.tokens != other.sequences.tokens).any()


def test_jit_equals_no_jit(small: Any):
    target, key, out = small
    with jax.disable_jit():
        eager = smc.run(key, target, num_particles=6, threshold=0.9, history=True)
    assert_same(out, eager)


def test_iterate_ends_where_run_ends(small: Any):
    target, key, out = small
    seen = list(smc.iterate(key, target, num_particles=6, threshold=0.9, history=True))
    assert len(seen) == int(out.steps)
    assert_same(out, seen[-1])
    for t, partial in enumerate(seen):
        assert int(partial.steps) == t + 1
        np.testing.assert_allclose(partial.log_z, out.trace.log_z[t], rtol=1e-5)
        assert (partial.sequences.tokens[:, t + 1 :] == EOS).all()


def test_replaying_the_genealogy_gives_the_strings(small: Any):
    _, _, out = small
    assert out.trace.resampled.any()
    rows: list[list[int]] = [[] for _ in range(6)]
    for tokens, ancestors in zip(np.asarray(out.history.tokens), np.asarray(out.history.ancestors), strict=True):
        rows = [[*row, int(token)] for row, token in zip(rows, tokens, strict=True)]
        rows = [rows[a] for a in ancestors]
    np.testing.assert_array_equal(out.sequences.tokens, rows)
    moved = (np.asarray(out.history.ancestors) != np.arange(6)).any(1)
    assert not moved[~np.asarray(out.trace.resampled)].any()


def test_the_trace_is_the_genealogys(small: Any):
    _, _, out = small
    steps, log_z = int(out.steps), 0.0
    for t in range(steps):
        weights = np.asarray(out.history.log_weights[t], np.float64)
        np.testing.assert_allclose(out.trace.ess[t], diagnostics.ess(out.history.log_weights[t]), rtol=1e-5)
        now = log_z + np.log(np.exp(weights).mean())
        np.testing.assert_allclose(out.trace.log_z[t], now, atol=1e-5)
        log_z = now if out.trace.resampled[t] else log_z
        assert bool(out.trace.resampled[t]) == (t < steps - 1 and float(out.trace.ess[t]) < 0.9 * 6)
    np.testing.assert_allclose(out.log_z, out.trace.log_z[steps - 1], rtol=1e-6)
    np.testing.assert_allclose(jnp.exp(out.log_weights).mean(), 1, rtol=1e-5)


def test_more_particles_keep_the_old_draws():
    target, key = target_of("hmm", "every_1"), jax.random.key(7)
    few = smc.run(key, target, num_particles=6, threshold=0.0)
    many = smc.run(key, target, num_particles=11, threshold=0.0)
    np.testing.assert_array_equal(few.sequences.tokens, many.sequences.tokens[:6])
    absolute = few.log_weights + few.log_z, (many.log_weights + many.log_z)[:6]
    np.testing.assert_allclose(*absolute, rtol=1e-4, atol=1e-5)


def test_a_longer_horizon_keeps_the_prefix():
    """Drawn tokens, weights and ancestors of the steps that both have; only the last step of the shorter differs."""
    lm, key = MODELS["hmm"](), jax.random.key(8)
    runs = [
        smc.run(key, lm.given(PROMPT, max_tokens=t) ** 1.7, num_particles=6, threshold=1.1, history=True)
        for t in (3, 5)
    ]
    (short, long) = (run.history for run in runs)
    np.testing.assert_array_equal(short.tokens, long.tokens[:3])
    np.testing.assert_allclose(short.log_weights, long.log_weights[:3], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(short.ancestors[:2], long.ancestors[:2])


def test_a_list_of_targets_is_single_runs():
    lm = MODELS["hmm"]()
    targets = [lm.given(prompt, max_tokens=4) ** a for prompt, a in (((2, 0), 1.7), ((3, 3, 0), 0.8), ((0,), 1.0))]
    key = jax.random.key(9)
    together = smc.run(key, targets, num_particles=6)
    for i, (one_key, target) in enumerate(zip(jax.random.split(key, 3), targets, strict=True)):
        single = smc.run(one_key, target, num_particles=6)
        assert_same(jax.tree.map(lambda leaf, i=i: leaf[i], together), single)
    alone = smc.run(key, targets[:1], num_particles=6)
    assert alone.sequences.tokens.shape == (1, 6, 4)
    twice = smc.run(key, [targets[0], targets[0]], num_particles=6)
    assert (twice.sequences.tokens[0] != twice.sequences.tokens[1]).any()


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """What JAX compiles inside the block."""
    events: list[str] = []

    def listen(event: str, duration: float, **kwargs: Any) -> None:
        if event.endswith("backend_compile_duration"):
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield events
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_one_compilation_per_shape():
    """Another key, prompt (and prompt length in the bucket), alpha, temperature, threshold: nothing is compiled."""
    proposal = TraceCounter(proposals.bootstrap)
    lm = MODELS["hmm"]()
    keys = [jax.random.key(i) for i in range(4)]

    def decode(key: Any, prompt: tuple[int, ...], alpha: float, temperature: float, threshold: float) -> Any:
        target = lm.given(prompt, max_tokens=4) ** alpha * ppl.reward(problems.score_arrays)
        warm = proposals.tempered(temperature)
        out = smc.run(key, target, num_particles=3, proposal=warm, threshold=threshold)
        return out, smc.run(key, target, num_particles=3, proposal=proposal, threshold=threshold)

    decode(keys[0], (2, 0), 1.7, 1.3, 0.5)
    traces = proposal.count
    with compilations() as events:
        decode(keys[1], (2, 0), 1.7, 1.3, 0.5)
        decode(keys[2], (3, 0, 0, 3, 2), 0.4, 0.6, 1.1)
        decode(keys[3], tuple([3] * 16), 3.0, 2.0, 0.0)
    assert not events and proposal.count == traces
    with compilations() as events:
        decode(keys[3], tuple([3] * 17), 3.0, 2.0, 0.0)
    assert events, "a prompt of the next bucket must be seen by this counter"


def test_it_stops_when_every_string_has_ended():
    target = MODELS["markov"]().given(PROMPT, max_tokens=60)
    out = smc.run(jax.random.key(10), target, num_particles=4, history=True)
    longest = int(out.sequences.length.max())
    assert longest < 50 and out.steps == longest + 1
    assert out.cost.forwards == out.steps  # the prompt's pass, then one for every further token
    assert (out.trace.active[: longest + 1] > 0).sum() == longest and not out.trace.active[longest:].any()
    assert (out.history.tokens[longest + 1 :] == EOS).all()
    assert (out.sequences.tokens[:, longest:] == EOS).all()


def test_cost():
    """Tokens count until a string's EOS, without the idle ones; a potential is called as often as a token is drawn."""
    plain, key = problems.plain("hmm"), jax.random.key(11)
    for target, calls in ((plain, False), (plain**2, False), (target_of("hmm", "every_1"), True)):
        out = smc.run(key, target, num_particles=6, threshold=0.0)
        drawn = int(jnp.minimum(out.sequences.length + 1, 4).sum())
        assert out.cost.tokens == drawn
        assert out.cost.potential_calls == drawn * calls
        assert out.cost.forwards == out.steps


def test_log_z_std_error_is_importance_samplings():
    out = smc.run(jax.random.key(12), target_of("hmm", "every_1"), num_particles=6, threshold=0.0)
    weights = np.exp(np.asarray(out.log_weights, np.float64))
    np.testing.assert_allclose(out.log_z_std_error, weights.std() / np.sqrt(6) / weights.mean(), rtol=1e-4)


@pytest.mark.parametrize("threshold", [0.0, 0.7])
def test_log_z_std_error_is_calibrated(threshold: float):
    target = target_of("hmm", "reward")
    keys = jax.random.split(jax.random.key(13), 1500)
    options = {"num_particles": 60, "proposal": proposals.bootstrap, "resampler": RESAMPLERS["multinomial"]}

    def run(key: Any) -> Any:
        out = smc.run(key, target, threshold=threshold, **options)
        return out.log_z, out.log_z_std_error

    log_z, error = jax.jit(jax.vmap(run))(keys)
    ratio = float(error.mean() / log_z.std())
    assert 0.8 < ratio < 1.25


# Trouble.


def floats(out: Any) -> list[jax.Array]:
    return [leaf for leaf in jax.tree.leaves(out) if jnp.issubdtype(leaf.dtype, jnp.floating)]


@pytest.mark.parametrize("proposal", [proposals.bootstrap, proposals.locally_optimal])
def test_all_particles_dead(proposal: Any):
    """Token 2 cannot follow this prompt.  Flagged, and no NaN anywhere."""
    target = problems.plain("markov") * ppl.forced([2])
    out = smc.run(jax.random.key(14), target, num_particles=4, proposal=proposal, threshold=1.1, history=True)
    assert out.all_dead and out.log_z == -jnp.inf and (out.log_weights == -jnp.inf).all()
    assert out.steps == 1 and out.num_invalid == 0 and not out.trace.resampled.any()
    assert not any(jnp.isnan(leaf).any() for leaf in floats(out))
    assert diagnostics.ess(out.log_weights) == 0


def test_all_particles_dead_in_the_last_step():
    """A reward that forbids every string, after steps that resampled."""
    target = problems.plain("hmm") ** 2 * ppl.reward(lambda tokens, length: jnp.full(length.shape, -jnp.inf))
    out = smc.run(jax.random.key(15), target, num_particles=4, proposal=proposals.bootstrap, threshold=1.1)
    assert out.all_dead and not any(jnp.isnan(leaf).any() for leaf in floats(out))


BAD = (3, 0)
"""Strings that start so are the ones a potential fails on."""


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_an_invalid_factor_kills_its_particle_only(value: float):
    """The others go on as if nothing had happened, and the law is that of a potential that forbids those strings."""

    def failing(bad: Any, tokens: Any, length: Any) -> Any:
        fails = (length >= 2) & (tokens[:, 0] == BAD[0]) & (tokens[:, 1] == BAD[1])
        return jnp.where(fails, bad, problems.score_arrays(tokens, length))

    key, plain = jax.random.key(16), problems.plain("table")
    options = {"num_particles": 40, "proposal": proposals.bootstrap}
    targets = [plain * ppl.reward(jax.tree_util.Partial(failing, jnp.float32(v))) for v in (value, -jnp.inf)]
    bad, forbidden = (smc.run(key, target, threshold=0.0, **options) for target in targets)
    dead = jnp.isneginf(bad.log_weights)
    assert 0 < dead.sum() < 40
    assert bad.num_invalid == dead.sum() and forbidden.num_invalid == 0
    assert_same(dataclasses.replace(bad, num_invalid=forbidden.num_invalid), forbidden)
    resampled = smc.run(key, targets[0], threshold=1.1, **options)
    assert resampled.num_invalid > 0 and not any(jnp.isnan(leaf).any() for leaf in floats(resampled))


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_an_invalid_lookahead_kills_its_particle_only(value: float):
    """Drawing from a law with a NaN or infinite weight has no meaning; it must not poison the population."""

    @jax.tree_util.register_dataclass
    @dataclasses.dataclass(frozen=True)
    class Broken(type(ppl.banned([0]).within(4, 4, EOS))):
        def lookahead(self, state: Any) -> Any:
            known = jnp.zeros((state.shape[0], 4))
            return known.at[0, 3].set(value)

    bound = ppl.banned([2]).within(4, 4, EOS)
    target = dataclasses.replace(problems.plain("hmm"), potential=ppl.Product((Broken(bound.ids, bound.log_allowed),)))
    out = smc.run(jax.random.key(17), target, num_particles=4, threshold=0.0)
    assert not any(jnp.isnan(leaf).any() for leaf in floats(out))
    assert out.log_weights[0] == -jnp.inf and (out.log_weights[1:] > -jnp.inf).any()


@pytest.mark.bad_input
@pytest.mark.parametrize("num", [0, -1, 2.5, True])
def test_num_particles_must_be_a_count(num: Any):
    message = f"expected num_particles to be a whole number of at least 1, got {num}; pass e.g. num_particles=32"
    for run in (smc.run, lambda *args, **kwargs: next(smc.iterate(*args, **kwargs))):
        with pytest.raises(ValueError, match=message):
            run(jax.random.key(0), problems.plain("hmm"), num_particles=num)


def test_targets_of_a_list_must_fit_together():
    lm = MODELS["hmm"]()
    p = lm.given(PROMPT, max_tokens=4)
    message = "expected targets with one model, horizon, kind of potential and padded prompt length, got targets that"
    for other in (
        lm.given(PROMPT, max_tokens=5),
        lm.given([3] * 17, max_tokens=4),
        MODELS["table"]().given(PROMPT, max_tokens=4),
        p * ppl.must_end(),
        p**2,
    ):
        with pytest.raises(ValueError, match=message):
            smc.run(jax.random.key(0), [p, other])
    with pytest.raises(ValueError, match=r"padded prompts: \[16, 32\]\); pass the same max_tokens and pad_to=32"):
        smc.run(jax.random.key(0), [p, lm.given([3] * 17, max_tokens=4)])
    with pytest.raises(ValueError, match="expected .* of at least 1, got 0"):
        smc.run(jax.random.key(0), [])


def test_a_temperature_must_be_positive():
    with pytest.raises(ValueError, match="expected a temperature above 0, got 0.0"):
        proposals.tempered(0.0)
