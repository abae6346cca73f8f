import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppl import draw


def draws(seed, log_weights, num):
    """`num` independent draws from one law."""
    keys = jax.random.split(jax.random.key(seed), num)
    rows = jnp.broadcast_to(jnp.asarray(log_weights, jnp.float32), (num, len(log_weights)))
    return jax.jit(draw.categorical)(keys, rows)


def z_scores(tokens, probabilities):
    num = len(tokens)
    counts = np.bincount(np.asarray(tokens), minlength=len(probabilities))
    return (counts / num - probabilities) / np.sqrt(probabilities * (1 - probabilities) / num)


def asymmetric(vocab_size):
    """Weights over two decades, in an order unrelated to the index."""
    rng = np.random.default_rng(0)
    return rng.permutation(np.linspace(-3.0, 2.0, vocab_size))


@pytest.mark.parametrize("vocab_size", [2, 7, 256, 257, 700])
def test_frequencies_match_the_law(vocab_size):
    log_weights = asymmetric(vocab_size)
    truth = np.exp(log_weights) / np.exp(log_weights).sum()
    tokens, log_prob = draws(1, log_weights, 20_000)
    common = truth * 20_000 > 10
    assert common.sum() >= min(vocab_size, 100)
    assert np.abs(z_scores(tokens, truth)[common]).max() < 5
    chi_square = (np.square(z_scores(tokens, truth)) * (1 - truth))[common].sum()
    assert abs(chi_square - common.sum()) < 5 * np.sqrt(2 * common.sum())
    np.testing.assert_allclose(log_prob, np.log(truth)[np.asarray(tokens)], rtol=1e-5, atol=1e-5)


def test_both_levels_are_independent():
    """Were one uniform used for both levels, the token would be a function of the block."""
    log_weights = np.tile(np.log([1.0, 3.0]), 256)
    truth = np.tile([0.25, 0.75], 256) / 256
    tokens, _ = draws(2, log_weights, 20_000)
    blocks, parity = np.asarray(tokens) // 256, np.asarray(tokens) % 2
    joint = z_scores(
        blocks * 2 + parity, truth.reshape(2, 256).sum(1)[:, None].dot([[0.25, 0.75]]).ravel()
    )
    assert np.abs(joint).max() < 5


def test_zero_mass_is_never_drawn_in_a_large_vocabulary():
    vocab_size, num = 49152, 128
    log_weights = np.full(vocab_size, -np.inf)
    allowed = np.random.default_rng(3).choice(vocab_size, 5000, replace=False)
    log_weights[allowed] = np.random.default_rng(4).normal(size=5000) * 3
    tokens, log_prob = draws(5, log_weights, num)
    assert np.isin(tokens, allowed).all()
    assert np.isfinite(log_prob).all()


@pytest.mark.parametrize("token", [0, 255, 256, 49151])
def test_a_single_token_with_mass_is_always_drawn(token):
    log_weights = np.full(49152, -np.inf)
    log_weights[token] = -80.0
    tokens, log_prob = draws(6, log_weights, 64)
    assert (np.asarray(tokens) == token).all()
    np.testing.assert_allclose(log_prob, 0.0, atol=1e-6)


@pytest.mark.parametrize("u", [0.0, 1 - 2**-23])
def test_edges_of_the_uniform_stay_on_positive_mass(u):
    """Zero weights at both ends, and weights whose float32 sums round: neither edge may leave the
    support.
    """
    weights = np.zeros((1, 256), np.float32)
    weights[0, 3:250] = np.random.default_rng(7).uniform(1e-8, 1, 247)
    index = int(draw._invert(jnp.float32([u]), jnp.asarray(weights))[0])
    assert index == (3 if u == 0 else 249)


def test_rounding_of_the_cumulative_sum_cannot_choose_a_weight_of_zero(monkeypatch):
    """A parallel sum may add in another order for every index, so that it creeps up where nothing
    was added.
    """
    weights = jnp.asarray([[1.0, 0.0, 2.0, 0.0]])
    crept = jnp.asarray([[1.0, 1.0000001, 3.0, 3.0000002]])
    monkeypatch.setattr(jnp, "cumsum", lambda *_, **__: crept)
    u = jnp.asarray([1.0]) / crept[:, -1]
    assert u * crept[0, -1] < crept[0, 1]
    assert draw._invert(u, weights)[0] == 2
    assert draw._invert(jnp.asarray([1 - 2**-24]), weights)[0] == 2


def test_a_row_without_mass_is_dead_and_leaves_its_neighbours_alone():
    keys = jax.random.split(jax.random.key(8), 3)
    rows = jnp.stack([jnp.full(300, -jnp.inf), jnp.zeros(300), jnp.full(300, -jnp.inf)])
    tokens, log_prob = draw.categorical(keys, rows)
    assert tokens[0] == tokens[2] == 0
    assert log_prob[0] == log_prob[2] == -jnp.inf
    np.testing.assert_allclose(log_prob[1], -np.log(300), rtol=1e-6)


def test_a_constant_shift_changes_nothing():
    log_weights = asymmetric(600)
    tokens, log_prob = draws(9, log_weights, 200)
    shifted, shifted_log_prob = draws(9, log_weights - 4096.0, 200)
    assert (np.asarray(tokens) == np.asarray(shifted)).mean() > 0.98
    same = np.asarray(tokens) == np.asarray(shifted)
    np.testing.assert_allclose(
        np.asarray(log_prob)[same], np.asarray(shifted_log_prob)[same], atol=2e-3
    )


def test_more_rows_keep_the_old_rows_draws():
    rows = jnp.asarray(np.random.default_rng(10).normal(size=(40, 999)), jnp.float32)
    key = jax.random.key(11)
    few, _ = draw.categorical(jax.random.split(key, 40)[:8], rows[:8])
    many, _ = draw.categorical(jax.random.split(key, 40), rows)
    np.testing.assert_array_equal(few, many[:8])
