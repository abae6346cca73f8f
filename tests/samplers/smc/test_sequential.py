"""SMC is exact: E[Z-hat] = Z and LAW 1 for every string, against densities computed by
brute force.
"""

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
from ppl.pytrees import register_dataclass
from ppl.space import Space
from samplers import diagnostics, smc
from samplers.strings import proposals
from tests.helpers import EOS, MODELS, PROMPT
from tests.samplers import problems
from tests.samplers.problems import (
    PROPOSALS,
    RESAMPLERS,
    SELECTIONS,
    SOME_RESAMPLERS,
    THRESHOLDS,
    all_masses,
    check_law,
    gamma,
    target_of,
)


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


# Potentials see tokens, and models know of no potential; that each potential telescopes is shown in
# tests/ppl.  So every kind of target with one model: an automaton with dead ends, a reward at the
# end, scores at two kinds of boundaries (one of which forbids), a power of a part, one of all with
# a second model, and a product with a power of p.
ROWS = [
    ("markov", "regex"),
    slow("markov", "reward"),
    slow("table", "delimiters"),
    slow("table", "every_2"),
    slow("table", "power_of_potential"),
    slow("markov", "power_of_all"),
    slow("hmm", "product"),
]


@pytest.mark.parametrize(("model", "problem"), ROWS)
def test_law_1(model: str, problem: str):
    """Every proposal, resampler, selection and threshold: all together, and each value of each by
    itself.
    """
    found = all_masses(jax.random.key(1), target_of(model, problem), 1800)
    choices = (PROPOSALS, SOME_RESAMPLERS, SELECTIONS, THRESHOLDS)
    for i, j in itertools.combinations(range(4), 2):
        assert {(way[i], way[j]) for way in found} == set(itertools.product(choices[i], choices[j]))
    for place, values in enumerate(choices):
        for value in values:
            runs = [rows for way, rows in found.items() if way[place] == value]
            check_law(np.concatenate(runs), gamma(model, problem), resolution=0.02)
    check_law(np.concatenate(list(found.values())), gamma(model, problem), resolution=0.006)


@pytest.mark.slow
@pytest.mark.parametrize("problem", ["product", "every_1", "power_of_all"])
def test_optimal_twists_have_no_variance(problem: str):
    """Every weight is 1 and log_z exact, at every threshold and resampler, with 3 particles (Z by
    brute force).
    """
    target = target_of("table", problem)
    target = ppl.twists.twisted(target, ppl.exact.optimal_twist(target))
    log_z = np.log(sum(gamma("table", problem).values()))
    keys, thresholds = (
        jax.random.split(jax.random.key(4), 60),
        jnp.tile(jnp.asarray(THRESHOLDS), 20),
    )
    runs = jax.vmap(
        lambda key, threshold: smc.run(key, target, num_particles=3, threshold=threshold)
    )
    out = jax.jit(runs)(keys, thresholds)
    np.testing.assert_allclose(out.log_weights, 0.0, atol=1e-5)
    np.testing.assert_allclose(out.log_z, log_z, atol=1e-5)
    assert (out.log_z_std_error < 1e-4).all()


def assert_same(a: Any, b: Any) -> None:
    """Equal strings and counts; floats up to rounding (another compilation may fuse
    differently).
    """
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


@pytest.mark.slow
def test_jit_equals_no_jit(small: Any):
    target, key, out = small
    with jax.disable_jit():
        eager = smc.run(key, target, num_particles=6, threshold=0.9, history=True)
    assert_same(out, eager)


def test_iterate_ends_where_run_ends(small: Any):
    target, key, out = small
    seen = list(smc.iterate(key, target, num_particles=6, threshold=0.9, history=True))
    assert len(seen) == int(out.rounds)
    assert_same(out, seen[-1])
    for t, partial in enumerate(seen):
        assert int(partial.rounds) == t + 1
        np.testing.assert_allclose(partial.log_z, out.trace.log_z[t], rtol=1e-5)
        assert (partial.sequences.tokens[:, t + 1 :] == EOS).all()


def test_replaying_the_genealogy_gives_the_strings(small: Any):
    _, _, out = small
    assert out.trace.resampled.any()
    rows: list[list[int]] = [[] for _ in range(6)]
    for tokens, ancestors in zip(
        np.asarray(out.history.drawn), np.asarray(out.history.ancestors), strict=True
    ):
        rows = [
            [*rows[a], *drawn[drawn >= 0].tolist()]
            for a, drawn in zip(ancestors, tokens, strict=True)
        ]
    rows = [[*row, *[EOS] * (4 - len(row))] for row in rows]
    np.testing.assert_array_equal(out.sequences.tokens, rows)
    moved = (np.asarray(out.history.ancestors) != np.arange(6)).any(1)
    assert not moved[~np.asarray(out.trace.resampled)].any()


def test_the_trace_is_the_genealogys(small: Any):
    _, _, out = small
    steps, banked = int(out.rounds), 0.0
    for t in range(steps):
        before = out.trace.ess[t - 1] if t else 6.0
        assert bool(out.trace.resampled[t]) == (float(before) < 0.9 * 6)
        banked = float(out.trace.log_z[t - 1]) if out.trace.resampled[t] else banked
        weights = np.asarray(out.history.log_weights[t], np.float64)
        np.testing.assert_allclose(
            out.trace.ess[t], diagnostics.ess(out.history.log_weights[t]), rtol=1e-5
        )
        np.testing.assert_allclose(
            out.trace.log_z[t], banked + np.log(np.exp(weights).mean()), atol=1e-5
        )
    np.testing.assert_allclose(out.log_z, out.trace.log_z[steps - 1], rtol=1e-6)
    np.testing.assert_allclose(jnp.exp(out.log_weights).mean(), 1, rtol=1e-5)


def test_more_particles_keep_the_old_draws(small: Any):
    target, key, _ = small
    few = smc.run(key, target, num_particles=6, threshold=0.0, history=True)
    many = smc.run(key, target, num_particles=11, threshold=0.0, history=True)
    np.testing.assert_array_equal(few.sequences.tokens, many.sequences.tokens[:6])
    absolute = few.log_weights + few.log_z, (many.log_weights + many.log_z)[:6]
    np.testing.assert_allclose(*absolute, rtol=1e-4, atol=1e-5)


def test_a_longer_horizon_keeps_the_prefix(small: Any):
    """Drawn tokens, weights and ancestors of the steps that both have; only the last step of the
    shorter differs.
    """
    shorter = MODELS["table"]().given(PROMPT, max_tokens=3) ** 1.3 * ppl.step_scores(
        problems.score_arrays, ppl.Steps(every=1)
    )
    target, key, _ = small
    short, long = (
        smc.run(key, run, num_particles=6, threshold=1.1, history=True).history
        for run in (shorter, target)
    )
    np.testing.assert_array_equal(short.drawn, long.drawn[:3])
    np.testing.assert_allclose(short.log_weights[:2], long.log_weights[:2], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(short.ancestors, long.ancestors[:3])


@pytest.mark.slow
@pytest.mark.parametrize("num", [1, 2])
def test_a_list_may_repeat_one_target(num: int):
    target = MODELS["hmm"]().given(PROMPT, max_tokens=4) ** 1.7
    keys = jax.random.split(jax.random.key(9), num)
    together = smc.run(jax.random.key(9), [target] * num, num_particles=6)
    for i, key in enumerate(keys):
        single = smc.run(key, target, num_particles=6)
        assert_same(jax.tree.map(lambda leaf, i=i: leaf[i], together), single)


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


@pytest.mark.slow
def test_one_compilation_per_shape():
    """Another key, prompt (and prompt length in the bucket), alpha, temperature, threshold: nothing
    is compiled.
    """
    # Whichever tests ran before: what they compiled would hide the compilation that must be seen.
    jax.clear_caches()
    lm = MODELS["hmm"]()
    keys = [jax.random.key(i) for i in range(4)]

    def decode(
        key: Any, prompt: tuple[int, ...], alpha: float, temperature: float, threshold: float
    ) -> None:
        target = lm.given(prompt, max_tokens=4) ** alpha * ppl.reward(problems.score_arrays)
        proposal = proposals.tempered(temperature)
        smc.run(key, target, num_particles=3, proposal=proposal, threshold=threshold)

    decode(keys[0], (2, 0), 1.7, 1.3, 0.5)
    with compilations() as events:
        decode(keys[1], (2, 0), 1.7, 1.3, 0.5)
        decode(keys[2], (3, 0, 0, 3, 2), 0.4, 0.6, 1.1)
        decode(keys[3], (3,) * 16, 3.0, 2.0, 0.0)
    assert not events
    with compilations() as events:
        lm.given((3,) * 17, max_tokens=4)
    assert events, "a prompt of the next bucket must be seen by this counter"


def test_it_stops_when_every_string_has_ended():
    target = MODELS["markov"]().given(PROMPT, max_tokens=60)
    out = smc.run(jax.random.key(10), target, num_particles=4, history=True)
    longest = int(out.sequences.length.max())
    assert longest < 50 and out.rounds == longest + 1
    assert out.cost.forwards == out.rounds  # the prompt's pass, then one for every further token
    assert (out.trace.active[: longest + 1] > 0).sum() == longest and not out.trace.active[
        longest:
    ].any()
    assert (out.history.drawn[longest + 1 :] == -1).all()
    assert (out.sequences.tokens[:, longest:] == EOS).all()


def test_cost(small: Any):
    """Tokens count until a string's EOS, without the idle ones; a potential is called as often as a
    token is drawn.
    """
    target, key, _ = small
    for of, calls in ((target, True), (MODELS["hmm"]().given(PROMPT, max_tokens=4) ** 1.7, False)):
        out = smc.run(key, of, num_particles=6, threshold=0.0, history=calls)
        drawn = int(jnp.minimum(out.sequences.length + 1, 4).sum())
        assert out.cost.tokens == drawn
        assert out.cost.potential_calls == drawn * calls
        assert out.cost.forwards == out.rounds


def test_log_z_std_error_is_importance_samplings(small: Any):
    target, key, _ = small
    out = smc.run(key, target, num_particles=6, threshold=0.0, history=True)
    weights = np.exp(np.asarray(out.log_weights, np.float64))
    np.testing.assert_allclose(
        out.log_z_std_error, weights.std() / np.sqrt(6) / weights.mean(), rtol=1e-4
    )


def test_log_z_std_error_follows_lineages(small: Any):
    """Weights are summed by the ancestor in the first generation, found here by replaying the
    genealogy.
    """
    _, _, out = small
    roots = np.arange(6)
    for ancestors in np.asarray(out.history.ancestors[: int(out.rounds)]):
        roots = roots[ancestors]
    assert len(set(roots.tolist())) < 6
    shares = np.bincount(roots, np.exp(np.asarray(out.log_weights, np.float64)) / 6, minlength=6)
    np.testing.assert_allclose(
        out.log_z_std_error, np.sqrt(((shares - 1 / 6) ** 2).sum()), rtol=1e-4
    )


def test_log_z_std_error_is_calibrated():
    """The mean of the estimated standard error is about the true one, with and without
    resampling.
    """
    target = target_of("hmm", "reward")
    options = {
        "num_particles": 60,
        "proposal": proposals.bootstrap,
        "resampler": RESAMPLERS["multinomial"],
    }

    def run(key: Any, threshold: Any) -> Any:
        out = smc.run(key, target, threshold=threshold, **options)
        return out.log_z, out.log_z_std_error

    keys, thresholds = (
        jax.random.split(jax.random.key(13), 2000),
        jnp.repeat(jnp.array([0.0, 0.7]), 1000),
    )
    log_z, error = jax.jit(jax.vmap(run))(keys, thresholds)
    for part in (slice(1000), slice(1000, 2000)):
        assert 0.8 < float(error[part].mean() / log_z[part].std()) < 1.25


# Trouble.


def floats(out: Any) -> list[jax.Array]:
    return [leaf for leaf in jax.tree.leaves(out) if jnp.issubdtype(leaf.dtype, jnp.floating)]


@pytest.mark.parametrize("proposal", [proposals.locally_optimal, slow(proposals.bootstrap)])
def test_all_particles_dead(proposal: Any):
    """Token 2 cannot follow this prompt.  Flagged, and no NaN anywhere."""
    target = problems.plain("markov") * ppl.forced([2])
    out = smc.run(
        jax.random.key(14), target, num_particles=4, proposal=proposal, threshold=1.1, history=True
    )
    assert out.all_dead and out.log_z == -jnp.inf and (out.log_weights == -jnp.inf).all()
    assert out.rounds == 1 and out.num_invalid == 0 and not out.trace.resampled.any()
    assert not any(jnp.isnan(leaf).any() for leaf in floats(out))
    assert diagnostics.ess(out.log_weights) == 0


@pytest.mark.slow
def test_all_particles_dead_in_the_last_step():
    """A reward that forbids every string, after steps that resampled."""
    target = problems.plain("hmm") ** 2 * ppl.reward(
        lambda tokens, length: jnp.full(length.shape, -jnp.inf)
    )
    out = smc.run(
        jax.random.key(15), target, num_particles=4, proposal=proposals.bootstrap, threshold=1.1
    )
    assert out.all_dead and not any(jnp.isnan(leaf).any() for leaf in floats(out))


BAD = (3, 0)
"""Strings that start so are the ones a potential fails on."""


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_an_invalid_factor_kills_its_particle_only(value: float):
    """The others go on as if nothing had happened, and the law is that of a potential that forbids
    those strings.
    """

    def failing(bad: Any, tokens: Any, length: Any) -> Any:
        fails = (length >= 2) & (tokens[:, 0] == BAD[0]) & (tokens[:, 1] == BAD[1])
        return jnp.where(fails, bad, problems.score_arrays(tokens, length))

    key, plain = jax.random.key(16), problems.plain("table")
    options = {"num_particles": 40, "proposal": proposals.bootstrap}
    targets = [
        plain * ppl.reward(jax.tree_util.Partial(failing, jnp.float32(v)))
        for v in (value, -jnp.inf)
    ]
    bad, forbidden = (smc.run(key, target, threshold=0.0, **options) for target in targets)
    dead = jnp.isneginf(bad.log_weights)
    assert 0 < dead.sum() < 40
    assert bad.num_invalid == dead.sum() and forbidden.num_invalid == 0
    assert_same(dataclasses.replace(bad, num_invalid=forbidden.num_invalid), forbidden)
    resampled = smc.run(key, targets[0], threshold=1.1, **options)
    assert resampled.num_invalid > 0 and not any(
        jnp.isnan(leaf).any() for leaf in floats(resampled)
    )


@pytest.mark.parametrize("value", [jnp.inf, slow(jnp.nan)])
def test_an_invalid_lookahead_kills_its_token_only(value: float):
    """The first particle never draws it and lives, and every law that it was in is counted."""

    @register_dataclass
    @dataclasses.dataclass(frozen=True)
    class Broken(type(ppl.banned([0]).within(Space(4, EOS, 4)))):
        def lookahead(self, state: Any) -> Any:
            known = jnp.zeros((state.shape[0], 4))
            return known.at[0, 3].set(value)

    bound = ppl.banned([2]).within(Space(4, EOS, 4))
    target = dataclasses.replace(
        problems.plain("hmm"), potential=ppl.Product((Broken(bound.ids, bound.space),))
    )
    out = smc.run(jax.random.key(17), target, num_particles=4, threshold=0.0)
    assert not any(jnp.isnan(leaf).any() for leaf in floats(out))
    first = np.asarray(out.sequences.tokens[0])[: int(out.sequences.length[0])]
    assert out.log_weights[0] > -jnp.inf and 3 not in first
    assert out.num_invalid == min(len(first) + 1, 4)


@pytest.mark.bad_input
@pytest.mark.parametrize("num", [0, -1, 2.5, True])
def test_num_particles_must_be_a_count(num: Any):
    message = (
        f"expected num_particles to be a whole number of at least 1, got {num}; pass e.g."
        " num_particles=32"
    )
    for run in (smc.run, lambda *args, **kwargs: next(smc.iterate(*args, **kwargs))):
        with pytest.raises(ValueError, match=message):
            run(jax.random.key(0), problems.plain("hmm"), num_particles=num)


def test_targets_of_a_list_must_fit_together():
    lm = MODELS["hmm"]()
    p = lm.given(PROMPT, max_tokens=4)
    message = (
        "expected targets with one model, horizon, padded prompt length and kind of power and"
        " potential, got targ"
    )
    for other in (
        lm.given(PROMPT, max_tokens=5),
        lm.given([3] * 17, max_tokens=4),
        MODELS["table"]().given(PROMPT, max_tokens=4),
        p * ppl.must_end(),
        p**2,
    ):
        with pytest.raises(ValueError, match=message):
            smc.run(jax.random.key(0), [p, other])
    with pytest.raises(
        ValueError, match=r"padded prompts \[16, 32\], .*; make targets with lm.given_each"
    ):
        smc.run(jax.random.key(0), [p, lm.given([3] * 17, max_tokens=4)])
    with pytest.raises(ValueError, match="expected .* of at least 1, got 0"):
        smc.run(jax.random.key(0), [])


def test_a_temperature_must_be_positive():
    with pytest.raises(ValueError, match="expected a temperature above 0, got 0.0"):
        proposals.tempered(0.0)


@pytest.mark.parametrize("proposal", [proposals.bootstrap, slow(proposals.locally_optimal)])
def test_a_model_whose_logits_are_nan_kills_the_particle_and_is_counted(proposal: Any):
    lm = MODELS["markov"]()
    broken = dataclasses.replace(
        lm, params=lm.params.at[0].set(jnp.nan)
    )  # whatever follows token 0
    target = broken.given([3], max_tokens=4) ** 2
    out = smc.run(jax.random.key(0), target, num_particles=200, proposal=proposal, threshold=0.0)
    ended_at_zero = (out.sequences.tokens == 0).sum(1) > 0
    assert 0 < int(out.num_invalid) < 200 and not out.all_dead
    assert int(out.num_invalid) == int(jnp.isneginf(out.log_weights).sum())
    alive = ~jnp.isneginf(out.log_weights)
    assert not (
        alive & ended_at_zero & (out.sequences.tokens[:, 3] != 0)
    ).any()  # 0 in the last place harms nobody
    floats = [leaf for leaf in jax.tree.leaves(out) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert not any(jnp.isnan(leaf).any() for leaf in floats)


@pytest.mark.parametrize("power", [float("nan"), float("inf")])
def test_a_power_must_be_finite(power: float):
    with pytest.raises(ValueError, match=f"expected a finite power, got {power}"):
        MODELS["hmm"]().given(PROMPT, max_tokens=4) ** power


def test_one_particle_does_not_know_its_error():
    target = MODELS["hmm"]().given(PROMPT, max_tokens=4) ** 2
    assert smc.run(jax.random.key(0), target, num_particles=1).log_z_std_error == jnp.inf


@pytest.mark.bad_input
def test_weights_of_several_populations_are_refused():
    with pytest.raises(ValueError, match=r"of one population, got shape \(3, 8\)"):
        diagnostics.ess(jnp.zeros((3, 8)))
