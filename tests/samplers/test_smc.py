"""SMC is exact: E[Z-hat] = Z and LAW 1 for every string, against densities computed by brute force."""

from __future__ import annotations

import itertools

import jax
import pytest

from tests.helpers import MODELS
from tests.samplers.problems import PROBLEMS, PROPOSALS, RESAMPLERS, check_law, gamma, smc_masses, target_of

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
