"""Planted faults: the check that SMC passes must fail on each of them.

A sampler is traced anew for every mutant because its resampler is a new function; so nothing
compiled before is used, and nothing compiled here is used again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from ppl import draw, target
from ppl.sequences import Sequences
from samplers import base, population, resampling
from samplers.strings import growing, laws, proposals
from tests.helpers import EOS
from tests.samplers.problems import check_law, gamma, smc_masses, target_of

Patch = Callable[[pytest.MonkeyPatch], None]


@dataclasses.dataclass(frozen=True)
class Mutant:
    """What is broken, and a problem on which it matters."""

    plant: Patch
    problem: str
    model: str = "hmm"
    proposal: Any = proposals.bootstrap
    threshold: float = 1.1


def after_resampling(
    change: Callable[[base.Particles, base.Particles, Any], base.Particles],
) -> Patch:
    """Replace SMC's resampling step by change(before, after, ancestors)."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        def resample(key: Any, p: Any, *args: Any) -> Any:
            after, ancestors = base.resample(key, p, *args)
            return change(p, after, ancestors), ancestors

        patch.setattr(population, "resample", resample)

    return plant


def keep_weights(before: base.Particles, after: base.Particles, ancestors: Any) -> base.Particles:
    resampled = after.log_z != before.log_z
    kept = jnp.where(resampled, before.log_weights[ancestors], after.log_weights)
    return dataclasses.replace(after, log_weights=kept)


def forget_evidence(
    before: base.Particles, after: base.Particles, ancestors: Any
) -> base.Particles:
    return dataclasses.replace(after, log_z=before.log_z)


def cache_stays_behind(
    before: base.Particles, after: base.Particles, ancestors: Any
) -> base.Particles:
    return dataclasses.replace(
        after, state=dataclasses.replace(after.state, cache=before.state.cache)
    )


def potential_stays_behind(
    before: base.Particles, after: base.Particles, ancestors: Any
) -> base.Particles:
    return dataclasses.replace(
        after, state=dataclasses.replace(after.state, potential=before.state.potential)
    )


def ended_strings_are_weighted(patch: pytest.MonkeyPatch) -> None:
    """A string that has ended is drawn for and weighed like the others."""
    append = growing.append

    def never_ends(x: Sequences, token: Any, active: Any, eos: int) -> Any:
        longer, _ = append(x, token, active, eos)
        return longer, active & (longer.length < x.tokens.shape[1])

    patch.setattr(growing, "append", never_ends)


def wrong_law(patch: pytest.MonkeyPatch) -> None:
    """The token is drawn from the tempered law, and scored under the model's."""

    def categorical(keys: Any, log_weights: Any) -> Any:
        token, _ = draw.categorical(keys, log_weights)
        log_p = jax.nn.log_softmax(log_weights * TEMPERATURE)
        return token, jnp.take_along_axis(log_p, token[:, None], axis=1)[:, 0]

    patch.setattr(laws, "categorical", categorical)


def unnormalised_law(patch: pytest.MonkeyPatch) -> None:
    """The proposal's normaliser is forgotten: the weight of a locally optimal step."""

    def categorical(keys: Any, log_weights: Any) -> Any:
        token, _ = draw.categorical(keys, log_weights)
        return token, jnp.take_along_axis(log_weights, token[:, None], axis=1)[:, 0]

    patch.setattr(laws, "categorical", categorical)


def alpha_forgotten(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(target.Target, "log_prob_factor", lambda self, log_prob: log_prob)


def final_at_eos_only(patch: pytest.MonkeyPatch) -> None:
    factor = target.Target.factor
    patch.setattr(
        target.Target,
        "factor",
        lambda self, state, token, active, last: factor(self, state, token, active, last & False),
    )


def final_one_token_early(patch: pytest.MonkeyPatch) -> None:
    factor = target.Target.factor

    def early(self: Any, state: Any, token: Any, active: Any, last: Any) -> Any:
        now, log_factor, invalid = factor(self, state, token, active, last | True)
        return now, jnp.where(last & (token != EOS), 0.0, log_factor), invalid

    patch.setattr(target.Target, "factor", early)


def eos_takes_a_step(patch: pytest.MonkeyPatch) -> None:
    """EOS is given to `step`, and `final` is never called before the horizon."""

    def factor(self: Any, state: Any, token: Any, active: Any, last: Any) -> Any:
        state, log_factor = self.potential.step(state, token)
        log_factor = jnp.where(
            last & (token != EOS), log_factor + self.potential.final(state), log_factor
        )
        return state, jnp.where(active, log_factor, 0.0), jnp.zeros(token.shape[0], bool)

    patch.setattr(target.Target, "factor", factor)


TEMPERATURE = 1.3
tempered = proposals.tempered(TEMPERATURE)

MUTANTS = {
    "no reset after resampling": Mutant(after_resampling(keep_weights), "reward"),
    "EOS is not absorbing": Mutant(
        ended_strings_are_weighted, "every_1", "table", proposals.locally_optimal
    ),
    "proposal scored under the wrong law": Mutant(wrong_law, "plain", "table", tempered, 0.0),
    "final factor at EOS only": Mutant(final_at_eos_only, "reward", "markov", threshold=0.0),
    "alpha forgotten": Mutant(alpha_forgotten, "power", "markov", threshold=0.0),
    "final factor a token early": Mutant(final_one_token_early, "reward", "table", threshold=0.0),
    "EOS takes a step": Mutant(eos_takes_a_step, "every_2", "table", threshold=0.0),
    "proposal not normalised": Mutant(
        unnormalised_law, "power", "markov", proposals.locally_optimal, 0.0
    ),
    "evidence not banked": Mutant(after_resampling(forget_evidence), "every_1", "table"),
    "cache not reordered": Mutant(after_resampling(cache_stays_behind), "every_1", "table"),
    "potential's state not reordered": Mutant(
        after_resampling(potential_stays_behind), "second_lm", "table"
    ),
}


def check(name: str) -> None:
    """`test_smc.test_law_1` for one mutant."""
    of = MUTANTS[name]

    def resampler(*args: Any) -> Any:  # a new function at every call, hence a new trace
        return resampling.multinomial(*args)

    options = {"proposal": of.proposal, "resampler": resampler}
    found = smc_masses(
        jax.random.key(2), target_of(of.model, of.problem), 20_000, (of.threshold,), **options
    )
    check_law(found[of.threshold], gamma(of.model, of.problem), resolution=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_a_planted_fault_fails(name: str, monkeypatch: pytest.MonkeyPatch):
    MUTANTS[name].plant(monkeypatch)
    with pytest.raises(AssertionError, match="z = "):
        check(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["EOS is not absorbing", "potential's state not reordered"])
def test_without_the_fault_it_passes(name: str):
    check(name)
