"""What a normal-inverse-Wishart law says of Gaussian weights in closed form (NIW-Meta, arXiv
2306.09702): the expected KL that its objective needs, and the best local posterior.
"""

from __future__ import annotations

import numpy as np
import pytest
from scipy import special, stats

DIM, SHARE, DEGREES = 3, 2.5, 9.0
RNG = np.random.default_rng(0)


def positive(scale: float) -> np.ndarray:
    root = RNG.normal(size=(DIM, DIM))
    return scale * (root @ root.T + np.eye(DIM))


M0, V0 = RNG.normal(size=DIM), positive(2.0)
M, V = RNG.normal(size=DIM), positive(0.3)


def expected_kl(m: np.ndarray, v: np.ndarray) -> float:
    """E KL(N(m, V) || N(mu, S)) over S ~ IW(V0, n0), mu | S ~ N(m0, S / l0)."""
    inverse = DEGREES * np.linalg.inv(V0)
    digamma = special.digamma((DEGREES - np.arange(DIM)) / 2).sum()
    logs = np.linalg.slogdet(V0)[1] - np.linalg.slogdet(v)[1] - DIM * np.log(2) - digamma
    apart = m - M0
    return 0.5 * (np.trace(inverse @ v) + apart @ inverse @ apart + DIM / SHARE - DIM + logs)


def kl(m: np.ndarray, v: np.ndarray, mu: np.ndarray, sigma: np.ndarray) -> np.ndarray:
    """KL(N(m, V) || N(mu, S)) for many mu and S."""
    inverse = np.linalg.inv(sigma)
    apart = m - mu
    squares = np.einsum("ni,nij,nj->n", apart, inverse, apart)
    logs = np.linalg.slogdet(sigma)[1] - np.linalg.slogdet(v)[1]
    return 0.5 * (np.einsum("nij,ji->n", inverse, v) + squares - DIM + logs)


def test_the_expected_kl_is_the_mean_over_the_law():
    sigma = stats.invwishart(DEGREES, V0).rvs(60_000, random_state=RNG)
    noise = RNG.normal(size=(len(sigma), DIM, 1))
    mu = M0 + (np.linalg.cholesky(sigma / SHARE) @ noise)[..., 0]
    values = kl(M, V, mu, sigma)
    error = values.std() / len(values) ** 0.5
    assert error < 0.05
    assert abs(values.mean() - expected_kl(M, V)) < 5 * error
    # The law that is meant: with l0 = 1 in the place of 2.5, or without log 2, it would be seen.
    for other in (0.5 * DIM * (1 - 1 / SHARE), 0.5 * DIM * np.log(2)):
        assert abs(values.mean() - expected_kl(M, V) - other) > 5 * error


@pytest.mark.parametrize("seed", range(3))
def test_the_local_posterior_of_a_quadratic_loss(seed: int):
    """V* = (A + n0 V0^-1)^-1, m* = V* (A mbar + n0 V0^-1 m0) is least among perturbations."""
    rng = np.random.default_rng(seed)
    bar, curvature, inverse = rng.normal(size=DIM), positive(1.0), DEGREES * np.linalg.inv(V0)

    def objective(m: np.ndarray, root: np.ndarray) -> float:
        v = root @ root.T
        loss = 0.5 * ((m - bar) @ curvature @ (m - bar) + np.trace(curvature @ v))
        return loss + expected_kl(m, v)

    best = np.linalg.inv(curvature + inverse)
    mean, root = best @ (curvature @ bar + inverse @ M0), np.linalg.cholesky(best)
    least = objective(mean, root)
    for size in (1e-2, 1e-1, 1.0):
        for _ in range(100):
            changed = objective(
                mean + size * rng.normal(size=DIM),
                root + size * np.tril(rng.normal(size=root.shape)),
            )
            assert changed > least
