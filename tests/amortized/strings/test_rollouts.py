"""Rollouts against enumeration: scores are the guide's own, rewards those of every prefix, draws
the behaviour's.
"""

from __future__ import annotations

import dataclasses
import functools
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ppl
from amortized.strings import behaviours, guide, prefix_rewards, rollouts
from models import config, transformer
from ppl import exact
from ppl.lm import LM
from ppl.potential import Potential
from ppl.pytrees import register_dataclass
from ppl.sequences import Sequences
from ppl.target import Target
from samplers.strings import proposals
from tests import helpers
from tests.helpers import EOS, MAX_TOKENS, MODELS, PROMPT, VOCAB_SIZE
from tests.samplers.chains import suffix_chain
from tests.samplers.problems import score_arrays, target_of

ALL = exact.strings(VOCAB_SIZE, MAX_TOKENS, EOS)
STRINGS = helpers.as_strings(ALL.tokens, ALL.length)
ROW = {string: row for row, string in enumerate(STRINGS)}
NUM = 40_000
KEY = jax.random.key(0)


def plain() -> Target:
    return MODELS["table"]().given(PROMPT, max_tokens=MAX_TOKENS)


def one_step(q: Target, temperature: float = 1.0, epsilon: float = 0.0) -> dict[tuple, np.ndarray]:
    """The law of the token after every prefix, from full passes of the model and strings that q's
    potential allows.
    """
    allowed = [
        s
        for s, phi in zip(STRINGS, np.asarray(q.log_potential(ALL.tokens, ALL.length)), strict=True)
        if phi == 0
    ]
    laws = {}
    for prefix in {s[:t] for s in STRINGS for t in range(min(len(s), MAX_TOKENS - 1) + 1)}:
        logits = np.asarray(q.lm.prefill([*PROMPT, *prefix], pad_to=6).logits, np.float64)
        following = {
            s[len(prefix)] if len(s) > len(prefix) else EOS
            for s in allowed
            if s[: len(prefix)] == prefix
        }
        logits[[v for v in range(VOCAB_SIZE) if v not in following]] = -np.inf
        possible = np.isfinite(logits)
        if possible.any():
            p = np.exp((logits - logits.max()) / temperature)
            laws[prefix] = (1 - epsilon) * p / p.sum() + epsilon * possible / possible.sum()
    return laws


def law_of(laws: dict[tuple, np.ndarray]) -> np.ndarray:
    """The probability of every string from its one-step laws."""

    def probability(x: tuple) -> float:
        steps = [*x, EOS] if len(x) < MAX_TOKENS else x
        return float(
            np.prod([laws[x[:t]][v] if x[:t] in laws else 0.0 for t, v in enumerate(steps)])
        )

    return np.asarray([probability(x) for x in STRINGS])


CONSTRAINTS = {
    "none": ppl.Product(),
    "min_tokens": ppl.min_tokens(2),
    "banned": ppl.banned([2]) * ppl.must_end(),
}


def assert_scores(q: Target, found: rollouts.Scores) -> None:
    """The scores of ALL are the one-step laws, rewritten from full passes."""
    laws = one_step(q)
    possible = law_of(laws) > 0
    np.testing.assert_allclose(np.exp(found.log_prob(ALL.length)), law_of(laws), atol=1e-5)
    for row in np.flatnonzero(possible):
        x = STRINGS[row]
        with np.errstate(divide="ignore"):
            token = [np.log(laws[x[:t]][v]) for t, v in enumerate(x)]
            stop = [np.log(laws[x[:t]][EOS]) for t in range(min(len(x) + 1, MAX_TOKENS))]
        rest = [0.0] * MAX_TOKENS
        np.testing.assert_allclose(found.log_q[row], [*token, *rest][:MAX_TOKENS], atol=2e-5)
        np.testing.assert_allclose(
            found.log_q_stop[row], [*stop, *rest, 0.0][: MAX_TOKENS + 1], atol=2e-5
        )


@pytest.mark.parametrize("name", CONSTRAINTS)
def test_scores_are_the_guides_own_at_every_prefix(name: str):
    q = plain() * CONSTRAINTS[name]
    assert_scores(q, rollouts.scores(q, ALL))
    np.testing.assert_allclose(
        law_of(one_step(q)).sum(), 1.0, rtol=1e-6
    )  # whatever is forbidden is renormalised


def tempered_scores(q: Target) -> rollouts.Scores:
    hot = dataclasses.replace(q, lm=dataclasses.replace(q.lm, params=q.lm.params / 1.5))
    return rollouts.scores(dataclasses.replace(hot, prefix=hot.lm.prefill(PROMPT)), ALL)


def eos_scored_twice(q: Target) -> rollouts.Scores:
    found = rollouts.scores(q, ALL)
    token = q.token_log_probs(ALL.tokens, ALL.length)
    return dataclasses.replace(found, log_q=token)


def stop_scored_at_the_horizon(q: Target) -> rollouts.Scores:
    longer = q.lm.given(PROMPT, max_tokens=MAX_TOKENS)
    found = rollouts.scores(longer, ALL)
    at_end = jax.nn.log_softmax(jax.jit(LM.extend)(q.lm, q.prefix, ALL.tokens)[:, -1])[:, EOS]
    cut = ALL.length == MAX_TOKENS
    return dataclasses.replace(
        found, log_q_stop=found.log_q_stop.at[:, -1].set(jnp.where(cut, at_end, 0.0))
    )


def forbidden_not_renormalised(q: Target) -> rollouts.Scores:
    return rollouts.scores(q.under(q.lm), ALL)


@pytest.mark.parametrize(
    ("constraint", "fault"),
    [
        ("none", tempered_scores),
        ("none", eos_scored_twice),
        ("none", stop_scored_at_the_horizon),
        ("min_tokens", forbidden_not_renormalised),
    ],
)
def test_planted_faults_in_scores_are_found(
    constraint: str, fault: Callable[[Target], rollouts.Scores]
):
    q = (
        hmm_guide() * CONSTRAINTS[constraint]
        if fault is stop_scored_at_the_horizon
        else plain() * CONSTRAINTS[constraint]
    )
    assert_scores(q, rollouts.scores(q, ALL))
    with pytest.raises(AssertionError):
        assert_scores(q, fault(q))


def hmm_guide() -> Target:
    """Goes on beyond the horizon, as a table does not."""
    return plain().under(MODELS["hmm"]())


REWARDS = ["power", "reward", "regex", "every_2", "second_lm", "power_of_all"]


@pytest.mark.parametrize("name", REWARDS)
def test_rewards_of_prefixes_are_their_densities(name: str):
    target = target_of("table", name)
    found = np.asarray(prefix_rewards.at_every_prefix(target, ALL))
    density = np.asarray(target.log_density(ALL.tokens, ALL.length))
    expected = np.full_like(found, -np.inf)
    for row, x in enumerate(STRINGS):
        expected[row, : len(x) + 1] = [density[ROW[x[:t]]] for t in range(len(x) + 1)]
    np.testing.assert_allclose(np.exp(found), np.exp(expected), rtol=1e-4)
    assert np.isfinite(expected).any(1).mean() > 0.3


def test_a_reward_that_is_no_number_is_zero():
    target = plain() * ppl.reward(lambda tokens, length: jnp.where(length == 2, jnp.nan, 0.0))
    found = prefix_rewards.at_every_prefix(target, ALL)
    assert np.isneginf(found[:, 2]).all()
    assert np.isfinite(found[:, 1]).any()
    assert not np.isnan(found).any()


def assert_frequencies(x: Sequences, rows: Any, law: np.ndarray) -> None:
    """|z| < 5 for every string's share among the rows; strings of which few are expected count
    together.
    """
    index = exact.Enumeration(ALL, np.zeros(len(STRINGS)), VOCAB_SIZE).index(x.tokens[rows])
    counts = np.bincount(index, minlength=len(STRINGS))
    assert (counts[law == 0] == 0).all()
    counts, law = counts[law > 0], law[law > 0]
    rare = len(index) * law < 10
    if rare.any():
        counts, law = (np.append(a[~rare], a[rare].sum()) for a in (counts, law))
    z = (counts - len(index) * law) / np.sqrt(len(index) * law * (1 - law))
    assert np.abs(z).max() < 5


def test_draws_have_the_law_of_their_row_and_are_scored_under_the_guide():
    """Half of the rows on-policy, half tempered with a share of uniform tokens."""
    q, half = plain() * ppl.min_tokens(1), jnp.arange(NUM) % 2 == 1
    behaviour = behaviours.drawn(
        temperature=jnp.where(half, 1.7, 1.0), epsilon=jnp.where(half, 0.3, 0.0)
    )
    out = rollouts.roll(KEY, q, plain() * ppl.reward(score_arrays), behaviour)
    on_policy, off_policy = law_of(one_step(q)), law_of(one_step(q, 1.7, 0.3))
    assert_frequencies(out.sequences, np.flatnonzero(~half), on_policy)
    assert_frequencies(out.sequences, np.flatnonzero(half), off_policy)
    with pytest.raises(AssertionError):
        assert_frequencies(out.sequences, np.flatnonzero(half), on_policy)
    index = exact.Enumeration(ALL, np.zeros(len(STRINGS)), VOCAB_SIZE).index(out.sequences.tokens)
    np.testing.assert_allclose(
        np.exp(out.scores.log_prob(out.sequences.length)), on_policy[index], atol=1e-5
    )
    behaved = np.where(half, off_policy[index], on_policy[index])
    np.testing.assert_allclose(np.exp(out.log_behaviour), behaved, atol=1e-5)


@pytest.mark.slow
def test_given_rows_are_kept_and_searched_rows_follow_the_target():
    """The search leaves the target invariant: rows that start as its exact draws remain such."""
    target = plain() * ppl.reward(score_arrays)
    law = exact.enumerate_strings(target)
    start = jax.random.choice(KEY, len(STRINGS), (NUM,), p=jnp.asarray(law.probs, jnp.float32))
    strings = Sequences(ALL.tokens[start], ALL.length[start])
    thirds = jnp.arange(NUM) % 3
    behaviour = behaviours.given(behaviours.drawn(NUM), strings, thirds > 0)
    behaviour = behaviours.searched(behaviour, thirds == 2, num_moves=2)
    q = plain().under(MODELS["hmm"]())
    out = rollouts.roll(jax.random.key(1), q, target, behaviour)
    kept = np.flatnonzero(thirds == 1)
    np.testing.assert_array_equal(out.sequences.tokens[kept], strings.tokens[kept])
    assert_frequencies(out.sequences, np.flatnonzero(thirds == 2), law.probs)
    moved = (out.sequences.tokens != strings.tokens).any(1)[thirds == 2]
    assert moved.mean() > 0.2
    np.testing.assert_array_equal(np.isposinf(out.log_behaviour), thirds > 0)
    assert_frequencies(out.sequences, np.flatnonzero(thirds == 0), law_of(one_step(q)))


@pytest.mark.slow
def test_drawn_rows_may_be_searched_too():
    """Rows that were drawn, and not given: from the guide's law two moves lead to that law times
    the moves' matrix twice.
    """
    target, q = target_of("hmm", "reward"), target_of("markov", "plain")
    matrix = suffix_chain(target, proposal=proposals.LanguageModel(q)).matrix
    odd = jnp.arange(NUM) % 2 == 1
    behaviour = behaviours.searched(behaviours.drawn(NUM), odd, num_moves=2)
    out = rollouts.roll(jax.random.key(1), q, target, behaviour)
    drawn_law = law_of(one_step(q))
    assert_frequencies(out.sequences, np.flatnonzero(odd), drawn_law @ matrix @ matrix)
    assert_frequencies(out.sequences, np.flatnonzero(~odd), drawn_law)
    np.testing.assert_array_equal(np.isposinf(out.log_behaviour), odd)


@functools.cache
def small_guide() -> guide.Guide:
    sizes = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "context": 32}
    return guide.full(transformer.random(KEY, config.small(VOCAB_SIZE, **sizes), EOS))


@pytest.mark.slow
def test_a_decoder_scores_what_it_drew_as_it_drew_it():
    """Cached steps and the parallel pass agree; a row does not depend on how many there are."""
    target = small_guide().lm.given(PROMPT, max_tokens=6) * ppl.min_tokens(2)
    q = target.under(small_guide().lm) * ppl.min_tokens(2)
    out = rollouts.roll(KEY, q, target, behaviours.drawn(7))
    np.testing.assert_allclose(
        out.log_behaviour, out.scores.log_prob(out.sequences.length), atol=1e-4
    )
    np.testing.assert_array_equal(
        np.isfinite(out.log_reward),
        (np.arange(7) >= 2) & (np.arange(7) <= out.sequences.length[:, None]),
    )
    assert (np.asarray(out.sequences.length) >= 2).all()
    longest = int(out.sequences.length.max())
    assert int(out.cost.tokens) == int(np.minimum(np.asarray(out.sequences.length) + 1, 6).sum())
    assert int(out.cost.forwards) == min(longest + 1, 6) + 2
    fewer = rollouts.roll(KEY, q, target, behaviours.drawn(3))
    np.testing.assert_array_equal(fewer.sequences.tokens, out.sequences.tokens[:3])


def test_another_behaviour_compiles_nothing():
    target = plain() * ppl.reward(score_arrays)
    counter = helpers.TraceCounter(rollouts.roll)
    roll = jax.jit(counter)
    for seed, temperature, epsilon in ((0, 1.0, 0.0), (1, 2.0, 0.1), (2, 0.5, 0.5)):
        behaviour = behaviours.drawn(6, temperature=temperature, epsilon=epsilon)
        rows = jnp.arange(6) < seed
        behaviour = behaviours.given(
            behaviour, Sequences(ALL.tokens[20:26], ALL.length[20:26]), rows
        )
        out = roll(jax.random.key(seed), plain(), target, behaviour)
        np.testing.assert_array_equal(out.sequences.tokens[:seed], ALL.tokens[20 : 20 + seed])
    assert counter.count == 1


@pytest.mark.slow
def test_what_a_loss_scores_again_is_not_scored_twice():
    """Scores that nobody reads are no part of the compiled program."""
    lm = small_guide().lm
    target, behaviour = lm.given(PROMPT, max_tokens=6), behaviours.drawn(4)

    def flops(pick: Callable[[rollouts.Rollout], Any]) -> float:
        run = jax.jit(lambda key, lm: pick(rollouts.roll(key, target.under(lm), target, behaviour)))
        analysis = run.lower(KEY, lm).compile().cost_analysis()
        return analysis["flops"]

    # XLA counts a loop's body once, so the parallel pass of the scores is a good part of all.
    assert flops(lambda out: out.batch) < 0.85 * flops(lambda out: out)


def test_varied_temperatures():
    behaviour = behaviours.varied(KEY, 4000, low=0.5, high=2.0, share=0.6)
    temperature = np.asarray(behaviour.temperature)
    assert abs((temperature == 1).mean() - 0.4) < 0.04
    assert temperature.min() >= 0.5
    assert temperature.max() <= 2.0
    assert abs(temperature[temperature != 1].mean() - 1.25) < 0.05


def test_tokens_without_mass_are_never_drawn():
    log_q = jnp.log(jnp.asarray([[0.5, 0.0, 0.5, 0.0], [0.0, 0.0, 0.0, 0.0]]))
    law = behaviours.law(behaviours.drawn(2, epsilon=1.0), log_q)
    np.testing.assert_allclose(np.exp(law), [[0.5, 0.0, 0.5, 0.0], [0.0, 0.0, 0.0, 0.0]], atol=1e-6)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: behaviours.drawn(), "one number of rows, got num=None"),
        (lambda: behaviours.drawn(3, temperature=jnp.ones(2)), r"got num=3, temperature \(2,\)"),
        (lambda: behaviours.drawn(3, temperature=0.0), "temperatures above 0, got 0.0"),
        (lambda: behaviours.drawn(3, epsilon=1.5), r"epsilon in \[0, 1\], got 1.5"),
        (lambda: behaviours.varied(KEY, 3, low=2.0, high=1.0), "0 < low <= high, got 2.0 and 1.0"),
        (
            lambda: behaviours.given(behaviours.drawn(3), ALL, jnp.ones(3, bool)),
            "rows for 3 rows, got 121 and 3",
        ),
        (
            lambda: behaviours.searched(behaviours.drawn(3), jnp.ones(3, bool), num_moves=0),
            "num_moves",
        ),
        (
            lambda: plain() * ppl.min_tokens(MAX_TOKENS + 1),
            "minimum length of at most 4 .max_tokens=4., got 5",
        ),
        (lambda: rollouts.scores(plain() ** 2.0, ALL), "expected a guide without a power"),
        (
            lambda: rollouts.scores(plain() * ppl.reward(score_arrays), ALL),
            "constraint with a look-ahead",
        ),
        (
            lambda: rollouts.roll(
                KEY, MODELS["hmm"]().given(PROMPT, max_tokens=3), plain(), behaviours.drawn(2)
            ),
            r"over the target's strings, .* = \(4, 1, 4\), got \(4, 1, 3\); make it by"
            " target.under",
        ),
    ],
)
def test_bad_input_is_named(make: Callable[[], Any], message: str):
    with pytest.raises(ValueError, match=message):
        make()


# Not getrusage: its maximum is inherited from the process that starts this one, pytest's worker.
MEMORY_SCRIPT = """
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import models
from amortized.strings import guide, rollouts
from ppl.sequences import Sequences

lm, _ = models.load("smollm2-135m")
target = lm.given([7 + i for i in range(32)], max_tokens=24)
g = guide.lora(jax.random.key(0), lm)
x = Sequences(100 + jnp.arange(8 * 24).reshape(8, 24), jnp.full(8, 24))

@jax.jit
def gradient(params, frozen, target, x):
    def loss(params):
        q = target.under(g.join(params, frozen))
        return jnp.var(rollouts.scores(q, x).log_prob(x.length))

    return jax.grad(loss)(params)

found = jax.block_until_ready(gradient(g.params, g.frozen, target, x))
assert all(float(jnp.abs(pair["b"]).max()) > 0 for layer in found.layers for pair in layer.values())
print(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text()).group(1))
"""


@pytest.mark.slow
def test_a_lora_step_on_a_real_model_fits_4_gigabytes():
    """The gradient of 8 strings of 24 tokens on a prompt of 32, and only the adapter's: greatest
    resident memory.
    """
    command = [sys.executable, "-c", MEMORY_SCRIPT]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) * 1024 < 4e9


@register_dataclass
@dataclasses.dataclass(frozen=True)
class NotCut(Potential):
    """Strings that end, said only at their ends: the look-ahead does not see the horizon."""

    def init(self, num: int) -> Any:
        return jnp.zeros(num, jnp.int32)

    def step(self, state: Any, token: Any) -> tuple[Any, Any]:
        return state + 1, jnp.zeros(state.shape, jnp.float32)

    def final(self, state: Any) -> Any:
        return jnp.where(state == MAX_TOKENS, -jnp.inf, 0.0)

    def lookahead(self, state: Any) -> Any:
        return jnp.zeros((state.shape[0], VOCAB_SIZE), jnp.float32)


def test_a_string_that_a_last_factor_forbids_was_drawn_all_the_same():
    """Its log-probability is that of the law it came from, not of what it is worth."""
    out = rollouts.roll(KEY, plain() * NotCut(), plain(), behaviours.drawn(64))
    cut = np.asarray(out.sequences.length == MAX_TOKENS)
    assert cut.any() and not cut.all()
    drawn = out.scores.log_prob(out.sequences.length)
    np.testing.assert_allclose(out.log_behaviour, drawn, rtol=1e-5)
