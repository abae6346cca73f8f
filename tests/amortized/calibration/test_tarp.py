"""The ten verdicts: five posteriors, references that depend on x and references that do not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from amortized.calibration import tarp
from amortized.calibration.joint import Joint

from . import problems

NUM, SAMPLES = 4_000, 200
CRITICAL = 1.63
"""Of sqrt(N) sup |F_N - F|, at 1 %."""
POSTERIORS: dict[str, Callable[[np.random.Generator], Joint]] = {
    "exact": lambda rng: problems.gaussian(rng, NUM, SAMPLES),
    "sd .495": lambda rng: problems.gaussian(rng, NUM, SAMPLES, sd=0.495),
    "sd .35": lambda rng: problems.gaussian(rng, NUM, SAMPLES, sd=0.35),
    "sd 1.4": lambda rng: problems.gaussian(rng, NUM, SAMPLES, sd=1.4),
    "mean + .5": lambda rng: problems.gaussian(rng, NUM, SAMPLES, shift=0.5),
    "prior": lambda rng: problems.prior(rng, NUM, SAMPLES),
}
FOUND = {
    tarp.predicted: {"sd .495", "sd .35", "sd 1.4", "mean + .5", "prior"},
    tarp.independent: {"sd .495", "sd .35", "sd 1.4", "mean + .5"},
}


@pytest.mark.parametrize("reference", FOUND, ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", POSTERIORS)
def test_the_verdicts(name: str, reference: Any):
    """With independent references, the prior in the place of the posterior passes: which is why
    they are no proof of anything.
    """
    joint = POSTERIORS[name](np.random.default_rng(7))
    out = tarp.run(jax.random.key(1), joint, reference=reference)
    found = NUM**0.5 * out.statistic[0]
    assert (found > CRITICAL) == (name in FOUND[reference]), found
    assert (out.p_value < 0.01) == (found > CRITICAL)
    if name.startswith("sd"):
        assert (out.excess[0] > 0) == (name == "sd 1.4")
