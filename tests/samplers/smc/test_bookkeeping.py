"""What a run reports about itself, against small values that are known exactly: roots and standard
errors, missing support, passes.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ppl
from models import tabular
from samplers import smc
from samplers.base import Cost
from samplers.mcmc import suffix
from samplers.smc import bounds, resample_move
from samplers.strings import proposals
from tests.helpers import EOS, MAX_TOKENS, PROMPT, as_strings, hmm
from tests.samplers.problems import plain, target_of

CHOSEN = (1, 2, 3, 3)
"""Ancestors of every resampling.  Twice over they are (2, 3, 3, 3): neither a permutation nor one
that repeats itself."""


def chosen(key: Any, log_weights: Any, num: int) -> Any:
    return jnp.asarray(CHOSEN, jnp.int32)


def roots(num_resamplings: int) -> np.ndarray:
    """Ancestors in the first generation after so many resamplings by `chosen`."""
    found = np.arange(len(CHOSEN))
    for _ in range(num_resamplings):
        found = found[list(CHOSEN)]
    return found


def std_error(log_weights: Any, found: np.ndarray) -> float:
    """sqrt( sum_e (sum_{i from e} W_i - 1/N)^2 )."""
    weights = np.exp(np.asarray(log_weights, np.float64))
    shares = np.bincount(found, weights / weights.sum(), minlength=len(CHOSEN))
    return float(np.sqrt(((shares - 1 / len(CHOSEN)) ** 2).sum()))


RUNS: dict[str, Any] = {
    "smc": lambda target, **options: smc.run(jax.random.key(0), target, **options),
    "resample-move": lambda target, **options: resample_move.run(
        jax.random.key(0), target, block_size=2, **options
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_roots_go_through_all_resamplings(name: str):
    """The standard error is that of weights added up by ancestors in the first generation."""
    target = target_of("table", "every_1") * ppl.min_tokens(MAX_TOKENS)
    out = RUNS[name](target, num_particles=len(CHOSEN), threshold=1.1, resampler=chosen)
    times = int(out.trace.resampled.sum())
    assert times == {"smc": MAX_TOKENS - 1, "resample-move": 2}[name]
    expected = std_error(out.log_weights, roots(times))
    assert float(out.log_z_std_error) == pytest.approx(expected, rel=1e-5)
    # Each generation counts.
    others = [std_error(out.log_weights, roots(n)) for n in (0, 1)]
    assert all(abs(other - expected) > 1e-3 for other in others)


def missing_by_hand(x: tuple[int, ...], k: int) -> float:
    """The greatest share of p^2 outside of the k heaviest tokens, over the string's steps."""
    found = []
    for t in range(min(len(x) + 1, MAX_TOKENS)):
        law = np.asarray(hmm().prefill([*PROMPT, *x[:t]], pad_to=8).logits, np.float64)
        law = np.exp(2 * (law - law.max()))
        found.append(1 - np.sort(law)[::-1][:k].sum() / law.sum())
    return max(found)


def test_missing_support_is_the_greatest_share_of_the_steps_that_were_made():
    """Of every string while it grew, whichever came first, and not of those that had ended."""
    target, k = plain("hmm") ** 2, 2
    for seed in range(3):
        out = smc.run(
            jax.random.key(seed),
            target,
            num_particles=3,
            proposal=proposals.top_k(k),
            threshold=0.0,
        )
        strings = as_strings(out.sequences.tokens, out.sequences.length)
        expected = max(missing_by_hand(x, k) for x in strings)
        assert float(out.missing_support) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("start", [0, 2, 3])
def test_missing_support_is_that_of_the_worst_round_whichever_it_was(start: int):
    """A chain 0 -> 2 -> 3 -> 0 whose law after 0 is the most even: of three tokens drawn, the one
    after 0 comes first, third or second.
    """
    even, fair, sharp = [0.3, 0.0, 0.45, 0.25], [0.1, 0.0, 0.2, 0.7], [0.96, 0.0, 0.02, 0.02]
    lm = tabular.markov([even, even, fair, sharp], eos=EOS)
    target = lm.given((start,), max_tokens=3)
    out = smc.run(jax.random.key(0), target, num_particles=2, proposal=proposals.top_k(1))
    assert float(out.missing_support) == pytest.approx(0.55, rel=1e-5)


GUIDE = proposals.LanguageModel(hmm().given((3, 0, 2), max_tokens=MAX_TOKENS))


def test_a_guides_passes_are_counted():
    """The model's pass before every token of the longest string, the prompt's for the first; a
    guide's over the prompt and after every token, beside the model's.
    """
    target = plain("table") ** 1.2
    out = smc.run(jax.random.key(0), target, num_particles=4, proposal=GUIDE, threshold=0.0)
    length = np.asarray(out.sequences.length)
    positions = np.minimum(length + 1, MAX_TOKENS)  # EOS is a token
    longest = int(positions.max())
    assert longest == int(out.rounds)
    assert int(out.cost.forwards) == longest + longest + 1
    assert int(out.cost.depth) == longest + 1
    assert int(out.cost.tokens) == positions.sum() and int(out.cost.potential_calls) == 0


def test_strings_know_their_density():
    """alpha log p + log Phi, added up token by token, against the referee."""
    target = target_of("table", "product") ** 1.4
    options = {"proposal": proposals.tempered(1.3), "threshold": 0.9, "steps": ppl.Steps(every=2)}
    out = smc.run(jax.random.key(3), target, num_particles=32, **options)
    living = np.asarray(out.log_weights) > -np.inf
    known = target.log_density(out.sequences.tokens, out.sequences.length)
    assert 8 < living.sum()
    np.testing.assert_allclose(out.log_density[living], known[living], rtol=1e-5, atol=1e-5)


def test_a_move_of_one_chain_takes_what_it_draws_and_the_guides_way_to_the_cut():
    """The guide has no way back to the cut but to step there again."""
    target = plain("table") ** 1.5
    kernel = suffix.kernel(target, proposal=GUIDE)
    state = kernel.init(smc.run(jax.random.key(1), target, num_particles=1).sequences)
    seen = set()
    for seed in range(8):
        state, info = kernel.step(jax.random.key(seed), state)
        cut, tokens = int(info.details["cut"][0]), int(info.tokens[0])
        replayed = cut if bool(info.proposed[0]) else 0
        assert int(info.cost.forwards) == 2 * tokens + replayed
        # Before each token the model reads prompt and string (for the first token it need not),
        # after it the guide reads its prompt of three and all of the string.
        lengths = range(cut, cut + tokens)
        model = sum(len(PROMPT) + length for length in lengths if length)
        guide = sum(3 + length + 1 for length in [*range(replayed), *lengths])
        assert int(info.cost.kv_read) == model + guide
        assert int(info.cost.tokens) == tokens and (tokens > 0) == bool(info.proposed[0])
        seen.add((cut > 0, tokens > 1))
    assert {(True, True), (False, True)} <= seen


def test_standard_errors_of_few_runs_have_a_degree_of_freedom_less():
    """Of 1, 2, 4: variance 7/3, not 14/9."""
    found = bounds.Bounds(jnp.asarray([1.0, 2.0, 4.0]), jnp.asarray([3.0, 7.0]), Cost())
    assert float(found.lower_std_error) == pytest.approx(math.sqrt(7 / 3 / 3), rel=1e-6)
    assert float(found.upper_std_error) == pytest.approx(2.0, rel=1e-6)
    gap = math.sqrt(7 / 9 + 4)
    assert float(found.gap_std_error) == pytest.approx(gap, rel=1e-6)
    assert float(found.gap) == pytest.approx(5 - 7 / 3, rel=1e-6)
    one = bounds.Bounds(jnp.asarray([1.0]), jnp.asarray([3.0, -jnp.inf]), Cost())
    assert math.isinf(float(one.lower_std_error)) and math.isinf(float(one.upper_std_error))


def test_invalid_particles_are_counted_once():
    """A score that is NaN from the second token on: each of four particles dies once."""
    target = plain("table") * ppl.min_tokens(MAX_TOKENS)
    nan = ppl.step_scores(lambda x, n: jnp.where(n >= 2, jnp.nan, 0.0), ppl.Steps(every=1))
    out = smc.run(
        jax.random.key(0), target * nan, num_particles=4, proposal=proposals.locally_optimal
    )
    assert int(out.num_invalid) == 4 and bool(out.all_dead)
