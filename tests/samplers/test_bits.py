"""A fixed key gives the draws that it always gave: strings exactly, weights up to rounding.

`python -m tests.samplers.test_bits` writes `bits.npz` anew; only a change that means to draw
something else may do so.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import ppl
from samplers import resampling, smc
from samplers.mcmc import chains, power, suffix
from samplers.smc import conditional
from samplers.strings import proposals as ways
from samplers.strings import selection
from tests.samplers.problems import plain, target_of

FIXTURE = Path(__file__).with_name("bits.npz")
# Keys are split and spent alike whatever the model: every way with one model.
SMC: dict[str, tuple[str, str, dict[str, Any]]] = {
    "default": ("markov", "regex", {}),
    "always": ("table", "product", {"threshold": 1.1, "resampler": resampling.multinomial}),
    "ahead": (
        "hmm",
        "power_of_all",
        {"selection": selection.next_token, "proposal": ways.bootstrap},
    ),
    "steps": (
        "markov",
        "delimiters",
        {"steps": ppl.Steps(delimiters=[3, 2]), "threshold": 1.1, "block_size": 4},
    ),
    "guided": (
        "hmm",
        "reward",
        {"proposal": ways.LanguageModel(plain("hmm")), "resampler": resampling.ssp},
    ),
}
SUFFIX: dict[str, tuple[str, dict[str, Any]]] = {
    "powered": ("hmm", {}),
    "tempered": ("table", {"temperature": 0.7}),
}


def of_smc(how: str) -> dict[str, Any]:
    model, problem, options = SMC[how]
    out = smc.run(jax.random.key(31), target_of(model, problem), num_particles=8, **options)
    found = {"tokens": out.sequences.tokens, "log_weights": out.log_weights, "log_z": out.log_z}
    return found | {"resampled": out.trace.resampled, "missing": out.missing_support}


def independent(key: Any, target: Any, num: int) -> Any:
    """Where chains start: strings of independent particles."""
    out = smc.run(key, target, num_particles=num, proposal=ways.locally_optimal)
    return out.sequences


def of_chains(how: str) -> dict[str, Any]:
    model, options = SUFFIX[how]
    target = plain(model) ** 2.5 * ppl.min_tokens(1)
    kernel = suffix.kernel(target, **options)
    start = independent(jax.random.key(32), target, 5)
    out = chains.run(jax.random.key(33), kernel, start, num_samples=12, thin=2)
    return {
        "tokens": out.draws["sequences"].tokens,
        "log_prob": out.draws["log_prob"],
        "cut": out.info.details["cut"],
    }


def of_power() -> dict[str, Any]:
    out = power.run(
        jax.random.key(34), plain("table") ** 3, num_chains=6, block_size=2, moves_per_block=3
    )
    return {"tokens": out.sequences.tokens, "log_p": out.state.log_prob}


def of_gibbs() -> dict[str, Any]:
    target = plain("table") ** 1.5
    kernel = conditional.kernel(target, num_particles=4, ancestor_sampling=True)
    start = independent(jax.random.key(35), target, 3)
    out = chains.run(jax.random.key(36), kernel, start, num_samples=6)
    return {"tokens": out.draws["sequences"].tokens, "log_z": out.info.details["log_z"]}


CASES = {
    **{f"smc-{model}-{how}": (of_smc, (how,)) for how, (model, *_) in SMC.items()},
    **{f"suffix-{model}-{how}": (of_chains, (how,)) for how, (model, _) in SUFFIX.items()},
    "power-table": (of_power, ()),
    "gibbs": (of_gibbs, ()),
}


@pytest.mark.parametrize("case", CASES)
def test_the_same_key_draws_what_it_always_drew(case: str):
    draws, args = CASES[case]
    with np.load(FIXTURE) as recorded:
        for name, value in draws(*args).items():
            old = recorded[f"{case}/{name}"]
            if np.issubdtype(old.dtype, np.floating):
                np.testing.assert_allclose(value, old, rtol=1e-5, atol=1e-5)
            else:
                np.testing.assert_array_equal(value, old)


def test_the_fixture_depends_on_the_key():
    recorded = np.load(FIXTURE)
    other = smc.run(jax.random.key(30), target_of("markov", "regex"), num_particles=8)
    assert (np.asarray(other.sequences.tokens) != recorded["smc-markov-default/tokens"]).any()


if __name__ == "__main__":
    pieces = {
        f"{case}/{name}": v
        for case, (draws, args) in CASES.items()
        for name, v in draws(*args).items()
    }
    np.savez_compressed(FIXTURE, **{name: np.asarray(value) for name, value in pieces.items()})
