"""Diagnostics of chains against closed forms, another library, and chains whose way is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ppl.sequences import Sequences
from samplers.mcmc import diagnostics


def autoregressive(
    rho: float, num_draws: int = 4000, num_chains: int = 4, seed: int = 0
) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(size=(num_draws, num_chains)) * np.sqrt(1 - rho**2)
    x = np.zeros_like(noise)
    x[0] = noise[0] / np.sqrt(1 - rho**2)
    for s in range(1, num_draws):
        x[s] = rho * x[s - 1] + noise[s]
    return x


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9])
def test_effective_samples_of_an_autoregression(rho: float):
    x = autoregressive(rho, 20_000)
    wanted = x.size * (1 - rho) / (1 + rho)
    assert diagnostics.bulk_ess(x) == pytest.approx(wanted, rel=0.1)
    # Ranks: neither a monotone map nor a scale matters.
    assert diagnostics.bulk_ess(np.exp(3 * x)) == pytest.approx(diagnostics.bulk_ess(x), rel=1e-6)
    assert diagnostics.split_r_hat(x) == pytest.approx(1, abs=0.005)


ARVIZ = {
    0: (231.105891, 1.0167043909),
    1: (222.598680, 1.0167138243),
    12: (222.433450, 1.0167914634),
}
"""What ArviZ 0.23.4 says of `autoregressive(0.8, 501)` at so many decimals: bulk ESS, and split
R-hat of the first 500 draws."""


@pytest.mark.parametrize("decimals", ARVIZ)
def test_another_library_agreed(decimals: int):
    x = np.round(autoregressive(0.8, 501), decimals)
    ess, r_hat = ARVIZ[decimals]
    assert diagnostics.bulk_ess(x) == pytest.approx(ess, rel=1e-3)
    assert diagnostics.split_r_hat(x[:500]) == pytest.approx(r_hat, rel=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("decimals", ARVIZ)
def test_another_library_agrees(decimals: int):
    import arviz  # of the dev extra: a slow lane without it fails

    x = np.round(autoregressive(0.8, 501), decimals)
    # ArviZ adds one more autocorrelation, the last positive one whose pair sums to less than zero.
    assert diagnostics.bulk_ess(x) == pytest.approx(float(arviz.ess(x.T, method="bulk")), rel=1e-3)
    assert diagnostics.split_r_hat(x[:500]) == pytest.approx(
        float(arviz.rhat(x[:500].T, method="split")), rel=1e-9
    )


def test_r_hat_sees_chains_that_differ_and_chains_that_drift():
    x = autoregressive(0.5, 400)
    assert diagnostics.split_r_hat(x + np.arange(4)) > 1.3
    assert diagnostics.split_r_hat(x + np.linspace(0, 3, 400)[:, None]) > 1.2
    # The classical formula, on halves.
    halves = np.concatenate([x[:200], x[200:]], axis=1)
    within, between = halves.var(axis=0, ddof=1).mean(), halves.mean(axis=0).var(ddof=1)
    assert diagnostics.split_r_hat(x) == pytest.approx(
        math.sqrt((within * 199 / 200 + between) / within)
    )


def test_neither_a_mean_nor_a_type_matters():
    """Draws k / 256 around 4096 are exact in float32, and a flag is 0 or 1."""
    x = np.round(256 * autoregressive(0.5, 400)) / 256
    for of in (diagnostics.split_r_hat, diagnostics.bulk_ess):
        assert of((x + 4096).astype(np.float32)) == pytest.approx(of(x), rel=1e-9)
        assert of(x > 0) == of((x > 0).astype(np.float64))


def test_chains_that_do_not_move_are_not_called_mixed():
    still, moving = np.tile(np.arange(4.0), (50, 1)), autoregressive(0.2, 2000)
    stuck = np.concatenate([moving[:, :3], np.zeros((2000, 1))], axis=1)
    broken = moving.copy()
    broken[3, 1] = -np.inf
    rows = {
        row.name: row
        for row in [
            *diagnostics.summary({"equal": np.full((50, 4), 2.0), "still": still, "fine": moving}),
            *diagnostics.summary({"stuck": stuck, "broken": broken, "one": moving[:, :1]}),
            *diagnostics.summary(
                {"apart": moving + np.arange(4), "whole": np.round(moving).astype(int)}
            ),
        ]
    }
    assert (
        math.isnan(rows["equal"].r_hat)
        and math.isnan(rows["equal"].ess)
        and math.isnan(rows["equal"].mcse)
    )
    assert rows["equal"].mean == 2 and "all draws are equal" in rows["equal"].note
    assert (
        math.isinf(rows["still"].r_hat)
        and rows["still"].ess < 5
        and "constant in 4 of 4" in rows["still"].note
    )
    assert rows["fine"].note == rows["whole"].note == "" and rows["fine"].mcse == pytest.approx(
        rows["fine"].sd / np.sqrt(rows["fine"].ess)
    )
    assert rows["stuck"].note == "constant in 1 of 4 chains"
    assert (
        math.isnan(rows["broken"].r_hat)
        and "1 of 4 chains have draws that are not finite" in rows["broken"].note
    )
    assert "one chain" in rows["one"].note and "have not mixed" in rows["apart"].note


def test_quantities_are_lengths_and_the_numbers_of_sites_that_have_few():
    rng = np.random.default_rng(3)
    few, many = (rng.normal(size=(5, 2, *shape)) for shape in ((2, 8), (17,)))
    length, swap = rng.integers(0, 4, (5, 2)), rng.normal(size=(5, 2))
    draws = {
        "sequences": Sequences(np.zeros((5, 2, 3), int), length),
        "position": rng.normal(size=(5, 2, 3)),
        "latents": {"few": few, "many": many},
        "rung": rng.integers(0, 3, (5, 2, 3)),
        "swap": swap,
    }
    found = diagnostics.quantities(draws)
    expected = {f"few[{i}, {j}]": few[:, :, i, j] for i in range(2) for j in range(8)}
    expected |= {"length": length, "swap": swap}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value)


def test_acceptance_by_cut_counts_the_moves_that_were_made():
    rng = np.random.default_rng(0)
    accepted, cut, made = (
        rng.random((30, 2, 4)) < 0.4,
        rng.integers(0, 5, (30, 2, 4)),
        rng.random((30, 2, 4)) < 0.8,
    )
    rate, count = diagnostics.acceptance_by_cut(accepted, cut, 6, made)
    for r in range(5):
        here = (cut == r) & made
        assert count[r] == here.sum() and rate[r] == pytest.approx(accepted[here].mean())
    assert count[5] == 0 and np.isnan(rate[5])
    everything, all_moves = diagnostics.acceptance_by_cut(accepted, cut, 6)
    assert all_moves.sum() == accepted.size and np.nansum(everything * all_moves) == pytest.approx(
        accepted.sum()
    )


# Tempering.


def ladder(probs: np.ndarray, num_draws: int = 3000, num_chains: int = 3) -> np.ndarray:
    """Rungs [S, C, K] after ordered sweeps, each swap with its own probability."""
    rng, num = np.random.default_rng(1), len(probs) + 1
    at = np.tile(np.arange(num), (num_chains, 1))
    rungs = [at.copy()]
    for _ in range(num_draws):
        for c in range(num_chains):
            for k in np.flatnonzero(rng.random(num - 1) < probs):
                pair = [np.flatnonzero(at[c] == k), np.flatnonzero(at[c] == k + 1)]
                at[c, pair[0]], at[c, pair[1]] = k + 1, k
        rungs.append(at.copy())
    return np.array(rungs)


def test_swap_acceptance_of_ordered_sweeps():
    probs = np.array([0.5, 0.1, 0.8])
    rungs = ladder(probs)
    error = np.sqrt(probs * (1 - probs) / (3 * 3000))
    assert (np.abs(diagnostics.swap_acceptance(rungs) - probs) < 5 * error).all()


def test_round_trips_go_from_the_coldest_to_the_hottest_and_back():
    # The first goes down and up twice, the second up and down once, which is half a trip, the third
    # down and up once.
    first = np.array([2, 1, 0, 1, 2, 2, 1, 0, 0, 1, 2, 1])
    other = np.array([0, 0, 1, 0, 0, 1, 2, 2, 1, 0, 0, 0])
    rungs = np.stack([first, other, 3 - first - other], axis=1)[:, None]
    assert diagnostics.round_trips(rungs).tolist() == [[2, 0, 1]]
    # Turning back halfway is no trip, and a start in between none either.
    half = np.array([1, 2, 1, 2, 1, 0, 1, 0, 1])
    assert (
        diagnostics.round_trips(np.stack([half, (half + 1) % 3, (half + 2) % 3], axis=1)[:, None])[
            0, 0
        ]
        == 0
    )


def test_round_trips_of_a_fast_and_a_slow_ladder():
    fast, slow = ladder(np.full(3, 0.9)), ladder(np.full(3, 0.1))
    assert diagnostics.round_trips(fast).sum() > 4 * diagnostics.round_trips(slow).sum() > 0
    assert diagnostics.round_trips(ladder(np.array([0.9, 0.0, 0.9]))).sum() == 0


@pytest.mark.bad_input
def test_bad_input():
    for x in (np.zeros((3, 2)), np.zeros(10)):
        with pytest.raises(ValueError, match=r"expected at least 4 draws \[S, C\], got"):
            diagnostics.split_r_hat(x)
    for rungs in (np.zeros((5, 2, 3), int), np.zeros((1, 1, 2), int), np.ones((5, 2, 1), int)):
        with pytest.raises(ValueError, match=r"expected rungs \[S, C, K\]"):
            diagnostics.round_trips(rungs)
