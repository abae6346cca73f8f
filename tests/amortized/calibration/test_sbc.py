"""Ranks: uniform for an exact sampler, not so for one that is off; ties, bins, many at once."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from scipy import stats

from amortized.calibration import sbc, uniform
from amortized.calibration.joint import Joint

from . import problems

KEY = jax.random.key(5)


def test_an_exact_sampler_passes():
    """Of 10,000 sets of uniform ranks (K = 2, N = 200, S = 39) 1.1 % had a p-value below 0.01;
    with N from 54 to 1,000 and S from 10 to 199 from 0.7 % to 1.1 %, and from 0.08 % to 0.22 %
    one below 0.001.
    """
    out = sbc.run(KEY, problems.gaussian(np.random.default_rng(1), 4_000, 199))
    assert out.p_value > 1e-3
    assert out.names == ("theta[0]", "theta[1]") and out.ranks.shape == (4_000, 2)
    assert out.ranks.min() == 0 and out.ranks.max() == 199


@pytest.mark.parametrize("variance", [0.8, 1.2])
def test_a_variance_that_is_off_by_a_fifth_fails(variance: float):
    sd = problems.SD * variance**0.5
    out = sbc.run(KEY, problems.gaussian(np.random.default_rng(1), 4_000, 199, sd=sd))
    assert out.p_value < 1e-3


def test_only_quantities_of_x_see_that_a_sampler_returns_the_prior():
    them = problems.prior(np.random.default_rng(2), 1_000, 99)
    assert sbc.run(KEY, them).p_value > 1e-3
    found = sbc.run(
        KEY, them, quantities=lambda theta, x: {"log p(x | theta)": -((theta - x) ** 2).sum() / 2}
    )
    assert found.names == ("log p(x | theta)",) and found.p_value < 1e-10


def counts(rng: np.random.Generator, num: int, samples: int) -> Joint:
    """x ~ Poisson(3) says nothing about theta ~ Binomial(3, 0.4), drawn from its prior: right."""
    theta = rng.binomial(3, 0.4, num)
    return Joint(theta, rng.poisson(3, num), rng.binomial(3, 0.4, (num, samples)))


def test_ties_have_places_at_random():
    them = counts(np.random.default_rng(3), 2_000, 19)
    assert sbc.run(KEY, them).p_value > 1e-3


@pytest.mark.parametrize("fault", [np.less, np.less_equal])
def test_ties_that_go_to_one_side_fail(fault: np.ufunc, monkeypatch: pytest.MonkeyPatch):
    """Planted: ranks by < or by <= alone."""

    def ranks(key: object, truth: np.ndarray, draws: np.ndarray) -> np.ndarray:
        return fault(draws, truth[:, None]).sum(axis=1)

    monkeypatch.setattr(uniform, "ranks", ranks)
    assert sbc.run(KEY, counts(np.random.default_rng(3), 2_000, 19)).p_value < 1e-10


@pytest.mark.parametrize("slack", [uniform.ROUNDING, 0.0])
def test_roundings_of_one_number_are_equal(slack: float, monkeypatch: pytest.MonkeyPatch):
    """Planted: comparing the floats themselves, where draws were computed in another order."""
    monkeypatch.setattr(uniform, "ROUNDING", slack)
    rng = np.random.default_rng(9)
    theta = np.log(rng.integers(2, 6, 2_000) / 7).astype(np.float32)
    draws = np.log(rng.integers(2, 6, (2_000, 9)) / 7).astype(np.float32)
    them = Joint(theta, rng.standard_normal(2_000), draws * np.float32(1 - 2e-7))
    assert (sbc.run(KEY, them).p_value > 1e-3) == (slack > 0)


def test_the_law_of_ranks_is_exact():
    """All S + 1 ranks have the same probability, with ties and infinite values too."""
    rng = np.random.default_rng(4)
    values = np.array([-np.inf, 0.0, 0.0, 1.0, np.inf])[rng.integers(0, 5, (40_000, 4, 1))]
    found = np.bincount(uniform.ranks(KEY, values[:, 0], values[:, 1:])[:, 0], minlength=4)
    assert stats.chisquare(found).pvalue > 1e-3


def test_bins_have_their_exact_probabilities():
    ranks = np.random.default_rng(5).integers(0, 11, (60, 2))
    found = uniform.binned(ranks, 10)  # 11 ranks, 60 of them: 11 bins would hold 5.45 each
    assert len(found.counts) == 11 and (found.counts.sum(0) == 60).all()
    found = uniform.binned(ranks[:54], 10)  # one rank of 11 is too little, so two at least
    assert len(found.counts) == 5
    found = uniform.binned(ranks, 10, bins=8)
    assert found.probabilities.sum() == pytest.approx(1)
    sizes = np.diff(found.edges)
    assert set(sizes) == {1, 2} and np.allclose(found.probabilities, sizes / 11)
    inside = (ranks[:, 0] >= found.edges[2]) & (ranks[:, 0] < found.edges[3])
    assert found.counts[2, 0] == inside.sum()
    expected = 60 * found.probabilities
    test = uniform.chi_squared(found)
    assert test.p_values[1] == pytest.approx(stats.chisquare(found.counts[:, 1], expected).pvalue)


def test_bins_may_be_unequal_and_the_test_right():
    """Planted: equal probabilities for bins of 1 and 2 ranks."""
    ranks = np.random.default_rng(6).integers(0, 30, (4_000, 1))
    found = uniform.binned(ranks, 29, bins=20)
    assert uniform.chi_squared(found).p_values[0] > 1e-3
    wrong = found._replace(probabilities=np.full(20, 0.05))
    assert uniform.chi_squared(wrong).p_values[0] < 1e-10


def test_many_p_values_are_corrected():
    adjusted = uniform.holm(np.array([0.01, 0.5, 0.02, 0.3]))
    np.testing.assert_allclose(adjusted, [0.04, 0.6, 0.06, 0.6])
    out = sbc.run(KEY, problems.gaussian(np.random.default_rng(7), 100, 9))
    assert out.p_value == pytest.approx(min(1, 2 * out.p_values.min()))


def test_too_few_simulations_and_too_many_bins_are_said():
    few = problems.gaussian(np.random.default_rng(8), 9, 9)
    with pytest.raises(ValueError, match="enough simulations for two bins of 5 ranks, got 9"):
        sbc.run(KEY, few)
    with pytest.raises(ValueError, match="expected from 2 to 5 bins for 30 ranks in 0..9"):
        sbc.run(KEY, problems.gaussian(np.random.default_rng(8), 30, 9), bins=7)
