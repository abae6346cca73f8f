"""Resamplers: E[copies of i] = num W_i, how far copies may stray, weights that change, and
float32's edges.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from samplers import resampling
from tests.samplers.problems import RESAMPLERS

SCHEMES = {**RESAMPLERS, "ssp": resampling.ssp, "killing": resampling.killing}
WITHOUT_REPLACEMENT = {"optimal": resampling.optimal, "gumbel_top_k": resampling.gumbel_top_k}
NUMS = [(name, num) for name in SCHEMES for num in ((7,) if name == "killing" else (7, 3, 12))]
WEIGHTS = np.array([0.02, 0.31, 0.0, 0.17, 0.005, 0.095, 0.4])
RUNS = 20_000


def log_weights(weights: Any, shift: float = 0.0) -> jax.Array:
    with np.errstate(divide="ignore"):
        return jnp.asarray(np.log(weights) + shift, jnp.float32)


@functools.partial(jax.jit, static_argnums=(0, 3))
def draw(resampler: Callable[..., Any], key: Any, rows: Any, num: int) -> Any:
    return resampler(key, rows, num)


@functools.partial(jax.jit, static_argnums=(0, 3))
def draw_many(resampler: Callable[..., Any], keys: Any, rows: Any, num: int) -> Any:
    return jax.vmap(lambda key: resampler(key, rows, num))(keys)


def copies(resampler: Callable[..., Any], weights: Any, num: int, seed: int = 0) -> np.ndarray:
    """How often each particle is chosen [RUNS, N]."""
    ancestors = draw_many(
        resampler, jax.random.split(jax.random.key(seed), RUNS), log_weights(weights), num
    )
    assert ancestors.shape == (RUNS, num) and ancestors.dtype == jnp.int32
    return np.stack([(np.asarray(ancestors) == i).sum(1) for i in range(len(weights))], axis=1)


def check_mean(counts: np.ndarray, weights: np.ndarray, num: int) -> None:
    """E[copies] = num W by z-tests; without spread the mean itself."""
    expected = num * weights / weights.sum()
    error = counts.std(0, ddof=1) / np.sqrt(len(counts))
    assert (error < 0.02).all()
    z = np.where(error > 0, (counts.mean(0) - expected) / np.where(error > 0, error, 1.0), 0.0)
    assert np.abs(z).max() < 5, f"z = {z}"
    assert np.allclose(counts.mean(0)[error == 0], expected[error == 0], atol=1e-5)


@pytest.mark.parametrize(("name", "num"), NUMS)
def test_mean_copies(name: str, num: int):
    counts = copies(SCHEMES[name], WEIGHTS, num)
    check_mean(counts, WEIGHTS, num)
    assert (counts.sum(1) == num).all() and (counts[:, 2] == 0).all()


def systematic_off_by_one(key: Any, log_weights: Any, num: int) -> Any:
    return (resampling.systematic(key, log_weights, num) + 1) % log_weights.shape[0]


def squared(key: Any, log_weights: Any, num: int) -> Any:
    return resampling.multinomial(key, 1.1 * log_weights, num)


def killing_that_redraws_from_the_killed(key: Any, log_weights: Any, num: int) -> Any:
    """What is killed is drawn anew from what was killed, not from all."""
    keep_key, draw_key = jax.random.split(key)
    weights = jnp.exp(log_weights)
    keep = jax.random.uniform(keep_key, (num,)) * weights.max() < weights
    drawn = resampling.multinomial(draw_key, jnp.where(keep, -jnp.inf, log_weights), num)
    return jnp.where(keep, jnp.arange(num), drawn).astype(jnp.int32)


def conditional(key: Any, log_weights: Any, num: int) -> Any:
    return resampling.conditional_multinomial(key, log_weights, num)


FAULTY = [systematic_off_by_one, squared, killing_that_redraws_from_the_killed, conditional]


@pytest.mark.parametrize("faulty", FAULTY)
def test_the_check_of_means_can_fail(faulty: Callable[..., Any]):
    with pytest.raises(AssertionError, match="z = "):
        check_mean(copies(faulty, WEIGHTS, 7), WEIGHTS, 7)


@pytest.mark.slow
@pytest.mark.parametrize("num", [7, 3, 12])
def test_counts_stay_close_to_their_means(num: int):
    """Systematic, SSP: floor or ceiling.  Stratified: less than 2 away.  Residual: at least the
    floor.  None varies more than multinomial."""
    counts = {
        name: copies(SCHEMES[name], WEIGHTS, num, seed=1) for name, size in NUMS if size == num
    }
    expected = num * WEIGHTS
    for name in ("systematic", "ssp"):
        assert ((counts[name] >= np.floor(expected)) & (counts[name] <= np.ceil(expected))).all()
    assert (np.abs(counts["stratified"] - expected) < 2).all()
    assert (counts["residual"] >= np.floor(expected)).all()
    assert not (counts["multinomial"] >= np.floor(expected)).all()
    moments = num * WEIGHTS * (1 - WEIGHTS)
    np.testing.assert_allclose(counts["multinomial"].var(0), moments, rtol=0.06, atol=0.005)
    for name in set(counts) - {"multinomial"}:
        assert (counts[name].var(0) <= 1.03 * moments + 0.005).all()
        assert counts[name].var(0).sum() < (0.9 if name == "killing" else 0.7) * moments.sum()


def test_killing_varies_little_when_weights_are_nearly_equal():
    weights = np.array([0.9, 1.0, 0.95, 0.85, 1.0, 0.92]) / 5.62
    counts = copies(resampling.killing, weights, 6)
    assert (counts.var(0) < 0.5 * 6 * weights * (1 - weights)).all()


def test_killing_needs_as_many_slots_as_particles():
    with pytest.raises(
        ValueError,
        match="as many slots as particles, got 3 slots for 7 particles; .* resampling.ssp",
    ):
        resampling.killing(jax.random.key(0), log_weights(WEIGHTS), 3)


@pytest.mark.parametrize("num", [7, 3])
def test_conditional_multinomial_pins_the_last_slot(num: int):
    """The other slots draw from all N, the last particle among them; here it is pinned though it is
    the heaviest.
    """
    ancestors = draw_many(
        resampling.conditional_multinomial,
        jax.random.split(jax.random.key(8), RUNS),
        log_weights(WEIGHTS),
        num,
    )
    assert (ancestors[:, -1] == 6).all()
    free = np.stack([(np.asarray(ancestors[:, :-1]) == i).sum(1) for i in range(7)], axis=1)
    check_mean(free, WEIGHTS, num - 1)
    dead = resampling.conditional_multinomial(jax.random.key(9), log_weights([0.5, 0.5, 0.0]), 3)
    assert int(dead[-1]) == 2 and int(dead[:2].max()) < 2


def test_a_dead_reference_stays_dead():
    """Else as `conditional_multinomial`, of the same key."""
    keys = jax.random.split(jax.random.key(8), 50)
    pinned = resampling.pinned_multinomial
    dead = np.asarray(draw_many(pinned, keys, log_weights([0.2, 0.8, 0.0]), 3))
    assert (dead < 2).all() and set(dead[:, -1]) == {0, 1}
    living = draw_many(pinned, keys, log_weights(WEIGHTS), 3)
    wanted = draw_many(resampling.conditional_multinomial, keys, log_weights(WEIGHTS), 3)
    np.testing.assert_array_equal(living, wanted)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("shift", [-1e4, 0.0, 80.0])
def test_a_constant_factor_changes_nothing(name: str, shift: float):
    key = jax.random.key(2)
    shifted = draw(SCHEMES[name], key, log_weights(WEIGHTS, shift), 7)
    # float32 keeps few digits of a log-weight near -1e4, so the weights are only nearly the same.
    assert (
        np.asarray(shifted) == np.asarray(draw(SCHEMES[name], key, log_weights(WEIGHTS), 7))
    ).all()


# float32.

BIG = 100_000


def big_weights(kind: str) -> np.ndarray:
    rng = np.random.default_rng(3)
    if kind == "equal":
        return np.ones(BIG)
    if kind == "skewed":
        return np.exp(4 * rng.normal(size=BIG))
    if kind == "sparse":
        return np.where(rng.random(BIG) < 0.01, rng.random(BIG), 0.0)
    ends = np.full(BIG, 1e-30)  # weights that vanish beside the others, first and last
    ends[BIG // 2] = 1.0
    return ends


@pytest.mark.parametrize("kind", ["equal", "skewed", "sparse", "vanishing"])
@pytest.mark.parametrize("name", SCHEMES)
def test_a_hundred_thousand_particles(name: str, kind: str):
    weights = big_weights(kind)
    ancestors = np.asarray(draw(SCHEMES[name], jax.random.key(4), log_weights(weights), BIG))
    assert ancestors.min() >= 0 and ancestors.max() < BIG
    counts, share = np.bincount(ancestors, minlength=BIG), weights / weights.sum()
    assert (weights[counts > 0] > 0).all()
    for part in np.array_split(np.arange(BIG), 20):
        expected = BIG * share[part].sum()
        loose = name in ("multinomial", "residual", "killing")
        slack = 5 * np.sqrt(expected) + 5 if loose else len(part) if name == "ssp" else 8
        assert abs(counts[part].sum() - expected) <= slack, (
            name,
            kind,
            expected,
            counts[part].sum(),
        )
    if name in ("systematic", "residual", "ssp"):
        assert (counts[BIG * share > 2] >= np.floor(BIG * share[BIG * share > 2]) - 1).all()


@pytest.mark.parametrize("point", [0.0, 0.5, 1 - 2**-24, 1.0])
def test_zero_weight_is_never_chosen_at_adversarial_points(point: float):
    """Points on the very edges of the cumulative weights, zeros at both ends and in the middle."""
    for weights in (
        [0, 0, 0.5, 0, 0.5, 0, 0],
        [0, 1, 0],
        [1, 0],
        [0, 1],
        [0.1, 0, 0.2, 0, 0, 0.7, 0],
    ):
        array = jnp.asarray(weights, jnp.float32)
        chosen = int(resampling._invert(array, jnp.float32([point]))[0])
        assert weights[chosen] > 0, (weights, point, chosen)


def test_cumulative_weights_that_fall_short_of_one():
    """Points are stretched to the weights' own sum: the last particles get their share, and no
    more.
    """
    weights = jnp.full(BIG, 0.9995 / BIG, jnp.float32).at[-1].set(0.0)
    assert float(jnp.cumsum(weights)[-1]) < 0.9999
    points = jnp.asarray((np.arange(BIG) + 0.5) / BIG, jnp.float32)
    chosen = np.asarray(resampling._invert(weights, points))
    assert chosen.max() == BIG - 2 and (np.diff(chosen) >= 0).all()
    assert (np.bincount(chosen, minlength=BIG) <= 2).all()


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("num", [5, 3, 8])
def test_all_dead_keeps_its_order(name: str, num: int):
    num = 5 if name == "killing" else num
    ancestors = draw(SCHEMES[name], jax.random.key(5), jnp.full(5, -jnp.inf), num)
    np.testing.assert_array_equal(ancestors, np.arange(num) % 5)


@pytest.mark.parametrize("name", SCHEMES)
def test_a_single_survivor_takes_all(name: str):
    rows = jnp.full(6, -jnp.inf).at[4].set(-1000.0)
    np.testing.assert_array_equal(draw(SCHEMES[name], jax.random.key(6), rows, 6), np.full(6, 4))


# Without replacement: the draws have weights.


def shares(
    resampler: Callable[..., Any], weights: Any, num: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """The new weight of each particle, mean_j exp(v_j) 1{a_j = i}, and how often it fills a slot of
    positive weight; both [RUNS, N]."""
    keys = jax.random.split(jax.random.key(seed), RUNS)
    ancestors, log_new = (
        np.asarray(x) for x in draw_many(resampler, keys, log_weights(weights), num)
    )
    assert ancestors.shape == log_new.shape == (RUNS, num) and ancestors.dtype == np.int32
    new = np.exp(log_new.astype(np.float64)) / num
    chosen = [ancestors == i for i in range(len(weights))]
    return np.stack([(new * c).sum(1) for c in chosen], 1), np.stack(
        [((new > 0) & c).sum(1) for c in chosen], 1
    )


def check_share(found: np.ndarray, weights: np.ndarray) -> None:
    expected = weights / weights.sum()
    error = found.std(0, ddof=1) / np.sqrt(len(found))
    assert (error < 0.01).all()
    noise = 1e-5 * expected + 1e-9  # float32; some particles keep their weights at every draw
    z = (found.mean(0) - expected) / np.maximum(error, noise)
    assert np.abs(z).max() < 5, f"z = {z}"


@pytest.mark.parametrize("num", [1, 3, 5, 6, 9])
@pytest.mark.parametrize("name", WITHOUT_REPLACEMENT)
def test_weighted_shares_are_unbiased_and_draws_differ(name: str, num: int):
    found, count = shares(WITHOUT_REPLACEMENT[name], WEIGHTS, num)
    check_share(found, WEIGHTS)
    assert count.max() == 1 and (count.sum(1) == min(num, 6)).all() and not count[:, 2].any()
    if num >= 6:  # six are alive: all are kept as they are
        np.testing.assert_allclose(
            found, np.broadcast_to(WEIGHTS, found.shape), rtol=1e-5, atol=1e-9
        )


def brute_force_c(weights: np.ndarray, num: int) -> float:
    """c with sum_i min(1, c W_i) = num, by bisection."""
    low, high = 0.0, num / weights[weights > 0].min()
    for _ in range(200):
        c = (low + high) / 2
        low, high = (c, high) if np.minimum(1, c * weights).sum() < num else (low, c)
    return low


@pytest.mark.parametrize("num", [1, 3, 5])
def test_optimal_keeps_the_heaviest_and_draws_the_others_by_c(num: int):
    found, count = shares(resampling.optimal, WEIGHTS, num)
    c = brute_force_c(WEIGHTS, num)
    inclusion = np.minimum(1, c * WEIGHTS)
    check_mean(count, inclusion, inclusion.sum())
    expected = count * np.maximum(WEIGHTS, 1 / c)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(found.sum(1), 1, rtol=1e-5)


def test_c_is_exact_where_the_public_one_is_biased():
    """W = (.6, .3, .1), num = 2: c = 2.5.  With the threshold weight counted in its own tail it
    would be 2, the new weights would sum to 1.1, and shares would be biased."""
    weights = np.array([0.6, 0.3, 0.1])
    _, log_c = resampling._threshold(log_weights(weights), 2)
    np.testing.assert_allclose(jnp.exp(log_c), 2.5, rtol=1e-6)
    found, _ = shares(resampling.optimal, weights, 2)
    np.testing.assert_allclose(found[:, 0], 0.6, rtol=1e-5)
    np.testing.assert_allclose(found.sum(1), 1, rtol=1e-5)


def test_c_counts_a_rest_whatever_the_order_of_the_others():
    """1 + c (.3 + .1) + .05 c = 2."""
    weights, rest = np.array([0.1, 0.6, 0.3]), jnp.log(jnp.float32(0.05))
    log_c = resampling.log_scale(log_weights(weights), rest, 2)
    np.testing.assert_allclose(jnp.exp(log_c), 1 / 0.45, rtol=1e-6)


@pytest.mark.slow
def test_a_tail_that_counts_the_threshold_weight_fails(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        resampling, "_threshold", lambda *args: (jnp.int32(1), jnp.log(jnp.float32(2.0)))
    )
    weights = np.array([0.6, 0.3, 0.1])
    keys = jax.random.split(jax.random.key(0), RUNS)
    ancestors, log_new = jax.vmap(lambda key: resampling.optimal(key, log_weights(weights), 2))(
        keys
    )
    new = np.exp(np.asarray(log_new, np.float64)) / 2
    np.testing.assert_allclose(new.sum(1), 1.1, rtol=1e-5)
    with pytest.raises(AssertionError, match="z = "):
        check_share(
            np.stack([(new * (np.asarray(ancestors) == i)).sum(1) for i in range(3)], 1), weights
        )


threshold = jax.jit(resampling._threshold, static_argnums=1)


def test_c_for_random_weights():
    for seed in range(20):
        check_c(seed)


def check_c(seed: int) -> None:
    rng = np.random.default_rng(seed)
    weights = np.sort(rng.dirichlet(np.full(30, 0.3)))[::-1] + 1e-12
    if seed % 2:
        weights[3:9] = weights[5]  # ties, at the threshold too
        weights = np.sort(weights)[::-1]
    weights /= weights.sum()
    for num in (1, 7, 15, 29):
        kept, log_c = threshold(log_weights(weights), num)
        c = float(jnp.exp(log_c))
        np.testing.assert_allclose(np.minimum(1, c * weights).sum(), num, rtol=1e-4)
        assert (c * weights[: int(kept)] >= 1 - 1e-4).all() and (
            c * weights[int(kept) :] <= 1 + 1e-4
        ).all()


def test_gumbel_top_k_draws_one_after_another_without_replacement():
    """The law of the ordered draw: P(i, j) = W_i W_j / (1 - W_i)."""
    keys = jax.random.split(jax.random.key(10), 2 * RUNS)
    ancestors, _ = draw_many(resampling.gumbel_top_k, keys, log_weights(WEIGHTS), 2)
    found = np.zeros((7, 7))
    np.add.at(found, tuple(np.asarray(ancestors).T), 1 / len(ancestors))
    for i, j in itertools.permutations(range(7), 2):
        p = WEIGHTS[i] * WEIGHTS[j] / (1 - WEIGHTS[i])
        z = (found[i, j] - p) / np.sqrt(max(p * (1 - p), 1e-9) / len(ancestors))
        assert abs(z) < 5 and (p > 0 or found[i, j] == 0), (i, j, z)


def unweighted(key: Any, log_weights: Any, num: int) -> Any:
    """Gumbel top-k whose draws all weigh the same."""
    ancestors, _ = resampling.gumbel_top_k(key, log_weights, num)
    return ancestors, jnp.zeros(num)


def threshold_is_the_last_kept(key: Any, log_weights: Any, num: int) -> Any:
    """Gumbel top-k with kappa the num-th key."""
    top, ancestors = jax.lax.top_k(log_weights + jax.random.gumbel(key, log_weights.shape), num)
    chosen = log_weights[ancestors]
    return ancestors, chosen - resampling.log_inclusion(chosen, top[-1]) + jnp.log(num)


@pytest.mark.parametrize("faulty", [unweighted, threshold_is_the_last_kept])
def test_the_check_of_shares_can_fail(faulty: Callable[..., Any]):
    found, _ = shares(faulty, WEIGHTS, 3)
    with pytest.raises(AssertionError, match="z = "):
        check_share(found, WEIGHTS)


def test_inclusion_probabilities_at_every_scale():
    log_ratio = np.array([-200.0, -60, -15.1, -14.9, -3, 0, 2, 5, 100])
    exact = np.log(-np.expm1(-np.exp(log_ratio)))
    exact[:2] = log_ratio[:2]
    found = resampling.log_inclusion(jnp.asarray(log_ratio - 40, jnp.float32), jnp.float32(-40))
    np.testing.assert_allclose(found, exact, rtol=1e-6, atol=1e-6)
    assert (resampling.log_inclusion(jnp.float32([-3, -200]), jnp.float32(-jnp.inf)) == 0).all()


@pytest.mark.parametrize("num", [1, 6, 8])
@pytest.mark.parametrize("name", WITHOUT_REPLACEMENT)
def test_few_or_no_survivors_without_replacement(name: str, num: int):
    """A single survivor is kept with all the weight; of none the order is kept, and no weight."""
    key = jax.random.key(11)
    one = jnp.full(6, -jnp.inf).at[4].set(-1000.0)
    ancestors, log_new = draw(WITHOUT_REPLACEMENT[name], key, one, num)
    np.testing.assert_array_equal(ancestors, np.full(num, 4))
    np.testing.assert_allclose(jnp.exp(log_new), np.where(np.arange(num) == 0, num, 0), rtol=1e-6)
    ancestors, log_new = draw(WITHOUT_REPLACEMENT[name], key, jnp.full(6, -jnp.inf), num)
    np.testing.assert_array_equal(ancestors, np.arange(num) % 6)
    assert (log_new == -jnp.inf).all()


@pytest.mark.parametrize("name", WITHOUT_REPLACEMENT)
def test_weights_that_vanish_beside_the_heaviest_are_still_drawn(name: str):
    """Beside e^0 the others are 0 in float32, among themselves they are 9 to 1."""
    rows = jnp.log(jnp.asarray([1.0, 0.9, 0.1])) - jnp.asarray([0.0, 300.0, 300.0])
    keys = jax.random.split(jax.random.key(12), 4000)
    ancestors, log_new = draw_many(WITHOUT_REPLACEMENT[name], keys, rows, 2)
    assert (ancestors[:, 0] == 0).all()
    share = float((ancestors[:, 1] == 1).mean())
    assert abs(share - 0.9) < 5 * np.sqrt(0.09 / 4000)
    assert np.isfinite(log_new).all()
    np.testing.assert_allclose(np.exp(log_new[:, 0]), 2, rtol=1e-5)


@pytest.mark.parametrize("kind", ["equal", "skewed", "sparse"])
@pytest.mark.parametrize("name", WITHOUT_REPLACEMENT)
def test_a_tenth_of_a_hundred_thousand_particles(name: str, kind: str):
    weights = big_weights(kind)
    ancestors, log_new = (
        np.asarray(x)
        for x in draw(
            WITHOUT_REPLACEMENT[name], jax.random.key(13), log_weights(weights), BIG // 10
        )
    )
    assert (weights[ancestors] > 0).all() and not np.isnan(log_new).any()
    living = min(BIG // 10, int((weights > 0).sum()))
    kept = ancestors[np.isfinite(log_new)]
    # A systematic draw may meet the same particle twice where rounding puts c W_i at 1.
    assert len(kept) == living and len(set(kept.tolist())) >= living - (
        20 if name == "optimal" else 0
    )
    total = np.exp(log_new.astype(np.float64)).sum() / len(ancestors)
    assert abs(total - 1) < (1e-3 if name == "optimal" else 0.1)
