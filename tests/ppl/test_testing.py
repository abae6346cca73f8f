"""The conformance kits pass what is right and name what is wrong: each planted fault is found by
its own message.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.core import Tracer

import ppl
from models import tabular
from ppl.lm import LM, Features
from ppl.potential import Potential, Power, Product
from ppl.pytrees import register_dataclass
from ppl.space import Space
from ppl.target import lm_potential
from ppl.testing import check_lm, check_potential
from ppl.testing.potentials import _PotentialChecks, generator
from tests import helpers

KEY = jax.random.key(5)


def check(lm, **options):
    check_lm(lm, helpers.PROMPT, key=KEY, **{"max_tokens": helpers.MAX_TOKENS, **options})


@pytest.mark.parametrize("name", helpers.MODELS)
def test_the_tabular_models_are_language_models(name):
    check(helpers.MODELS[name]())


def test_a_large_vocabulary_and_a_prompt_that_fills_its_bucket():
    lm = tabular.random_markov(jax.random.key(0), 300, eos=299)
    check_lm(lm, [3] * 16, key=KEY, num=2, max_tokens=3)


BASE = helpers.hmm().functions


def no_truncation(static, params, cache, length):
    return cache


def truncation_to_the_shortest(static, params, cache, length):
    return cache[0], jnp.full_like(length, length.min())


def stuck_position(static, params, prefix, cache, token):
    (beliefs, _), logits = BASE.step(static, params, prefix, cache, token)
    return (beliefs, cache[1]), logits


def rows_not_reordered(static, params, cache, ancestors):
    return cache


def lengths_not_reordered(static, params, cache, ancestors):
    return cache[0][ancestors], cache[1]


def rows_mixed(static, params, prefix, cache, token):
    cache, logits = BASE.step(static, params, prefix, cache, token)
    return cache, jnp.flip(logits, 0)


def padding_read(static, params, tokens, length):
    return BASE.prefill(static, params, tokens, jnp.int32(tokens.shape[0]))


def last_prompt_token_dropped(static, params, tokens, length):
    return BASE.prefill(static, params, tokens, length - 1)


def rows_last(static, params, prefix, num, max_tokens):
    beliefs, length = BASE.init(static, params, prefix, num, max_tokens)
    return jnp.moveaxis(beliefs, 0, 1), length


def half_logits(static, params, prefix, cache, token):
    cache, logits = BASE.step(static, params, prefix, cache, token)
    return cache, logits.astype(jnp.bfloat16)


def nan_logits(static, params, prefix, cache, token):
    cache, logits = BASE.step(static, params, prefix, cache, token)
    return cache, jnp.where(token[:, None] == 3, jnp.nan, logits)


def no_mass(static, params, prefix, cache, token):
    cache, logits = BASE.step(static, params, prefix, cache, token)
    return cache, jnp.full_like(logits, -jnp.inf)


def logits_of_the_wrong_size(static, params, prefix, cache, token):
    cache, logits = BASE.step(static, params, prefix, cache, token)
    return cache, logits[:, 1:]


def growing_cache(static, params, prefix, cache, token):
    (beliefs, length), logits = BASE.step(static, params, prefix, cache, token)
    return (jnp.concatenate([beliefs, beliefs[:, :1]], 1), length), logits


def weakly_typed_cache(static, params, prefix, num, max_tokens):
    beliefs, _ = BASE.init(static, params, prefix, num, max_tokens)
    return beliefs, jnp.broadcast_to(jnp.asarray(0), (num,))


def tracing_matters(static, params, prefix, cache, token):
    cache, logits = BASE.step(static, params, prefix, cache, token)
    return cache, logits if isinstance(token, Tracer) else logits[:, ::-1]


def step_by_step(static, params, prefix, cache, tokens):
    lm = dataclasses.replace(helpers.hmm(), params=params)
    empty = cache is None
    cache, logits = lm.advance(prefix, lm.init(prefix, *tokens.shape) if empty else cache, tokens)
    return None if empty else cache, logits


def advance_of_the_first_row(static, params, prefix, cache, tokens):
    return step_by_step(static, params, prefix, cache, jnp.broadcast_to(tokens[:1], tokens.shape))


def advance_one_token_late(static, params, prefix, cache, tokens):
    cache, logits = step_by_step(static, params, prefix, cache, tokens)
    return cache, jnp.roll(logits, 1, axis=1)


def advance_from_the_start(static, params, prefix, cache, tokens):
    """Right without a cache and from an empty one."""
    cut = None if cache is None else (cache[0], jnp.zeros_like(cache[1]))
    return step_by_step(static, params, prefix, cut, tokens)


def advance_at_one_length(static, params, prefix, cache, tokens):
    """Right as long as all rows are equally long."""
    one = None if cache is None else (cache[0], jnp.full_like(cache[1], cache[1].max()))
    return step_by_step(static, params, prefix, one, tokens)


def advance_that_writes_nothing(static, params, prefix, cache, tokens):
    advanced, logits = step_by_step(static, params, prefix, cache, tokens)
    return None if cache is None else (cache[0], advanced[1]), logits


def advance_without_a_length(static, params, prefix, cache, tokens):
    advanced, logits = step_by_step(static, params, prefix, cache, tokens)
    return None if cache is None else (advanced[0], cache[1]), logits


def advance_that_grows_the_cache(static, params, prefix, cache, tokens):
    advanced, logits = step_by_step(static, params, prefix, cache, tokens)
    if cache is not None:
        advanced = jnp.concatenate([advanced[0], advanced[0][:, :1]], 1), advanced[1]
    return advanced, logits


LM_FAULTS = [
    ("truncate", no_truncation, "step after truncate disagrees with a full pass"),
    ("truncate", truncation_to_the_shortest, "step after truncate disagrees"),
    ("step", stuck_position, r"step disagrees with a full pass: row \d, 2 tokens"),
    ("reorder", rows_not_reordered, "step after reorder disagrees"),
    ("reorder", lengths_not_reordered, "step after truncate and reorder disagrees"),
    ("step", rows_mixed, r"step without jit disagrees with a full pass: row \d, 1 tokens"),
    ("prefill", padding_read, "prefill with another padding disagrees|step without jit disagrees"),
    ("prefill", last_prompt_token_dropped, "step without jit disagrees"),
    (
        "init",
        rows_last,
        r"init\(4\) returns must have the particle axis of 4 first, leaf \[0\] has shape"
        r" \(5, 4, 3\)",
    ),
    ("step", half_logits, "must be float32, got bfloat16"),
    ("step", nan_logits, "must not be NaN"),
    ("step", no_mass, "must leave some token possible"),
    ("step", logits_of_the_wrong_size, r"must have shape \(4, 4\), got \(4, 3\)"),
    (
        "step",
        growing_cache,
        r"step must keep the structure.*\[0\] was float32\[4, 5, 3\] and is float32\[4, 6, 3\]",
    ),
    # A weak integer is int64 in double precision, another type at once.
    (
        "init",
        weakly_typed_cache,
        "truncate must keep the structure"
        if jax.config.jax_enable_x64
        else "step was traced 2 times for one shape",
    ),
    ("step", tracing_matters, "step without jit disagrees"),
    (
        "advance",
        advance_of_the_first_row,
        r"extend disagrees with a full pass: row [1-3], 1 tokens",
    ),
    ("advance", advance_one_token_late, r"extend disagrees with a full pass: row \d, 1 tokens"),
    ("advance", advance_from_the_start, "advance after truncate disagrees"),
    ("advance", advance_at_one_length, "advance after truncate disagrees"),
    ("advance", advance_that_writes_nothing, "step after advance must leave some token possible"),
    ("advance", advance_without_a_length, "step after advance disagrees"),
    ("advance", advance_that_grows_the_cache, r"advance must keep the structure"),
]

FEATURES = Features(BASE.prefill, BASE.step, step_by_step, lambda static, params, hidden: hidden)
"""Logits are hidden states as good as any."""


def test_features_are_checked():
    check(dataclasses.replace(helpers.hmm(), functions=BASE._replace(features=FEATURES)))


@pytest.mark.parametrize(
    ("member", "fault", "message"),
    [
        ("prefill", last_prompt_token_dropped, "features of prefill disagrees"),
        ("step", rows_mixed, "features of step disagrees"),
        ("step", growing_cache, "features of step must keep the structure"),
        ("advance", advance_one_token_late, "features of advance disagrees"),
        ("advance", advance_from_the_start, "features of advance disagrees"),
        ("logits", lambda static, params, hidden: 2 * hidden, "features of prefill disagrees"),
    ],
)
def test_a_planted_fault_in_features_is_named(member, fault, message):
    features = FEATURES._replace(**{member: fault})
    faulty = dataclasses.replace(helpers.hmm(), functions=BASE._replace(features=features))
    with pytest.raises(AssertionError, match=message):
        check(faulty)


def test_a_model_without_features_says_so():
    with pytest.raises(ValueError, match="expected a model that gives hidden states, got one with"):
        _ = helpers.hmm().features


@pytest.mark.parametrize("name", ["table", "hmm", "features"])
def test_the_logits_at_a_token_of_each_row_are_those_of_advance(name):
    if name == "features":
        lm = dataclasses.replace(helpers.hmm(), functions=BASE._replace(features=FEATURES))
    else:
        lm = helpers.MODELS[name]()
    prefix = lm.prefill(helpers.PROMPT)
    tokens = jnp.asarray([[0, 2, 3], [3, 0, 0]], jnp.int32)
    last = jnp.asarray([2, 0], jnp.int32)
    cache = lm.init(prefix, 2, 4)
    after, logits = lm.advance(prefix, cache, tokens)
    found = jax.jit(LM.logits_at)(lm, prefix, cache, tokens, last)
    expected = after, logits[jnp.arange(2), last]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, expected)


@pytest.mark.parametrize(
    ("member", "fault", "message"), LM_FAULTS, ids=[f[1].__name__ for f in LM_FAULTS]
)
def test_a_planted_fault_in_a_model_is_named(member, fault, message):
    faulty = dataclasses.replace(helpers.hmm(), functions=BASE._replace(**{member: fault}))
    with pytest.raises(AssertionError, match=message):
        check(faulty)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"static": []}, "must be hashable"),
        ({"eos": 4}, r"eos must be in \[0, 4\), got 4"),
        ({"params": helpers.hmm().params | {"scale": 1.0}}, r"params\['scale'\] is float"),
    ],
)
def test_faulty_data_is_named(change, message):
    with pytest.raises(AssertionError, match=message):
        check(dataclasses.replace(helpers.hmm(), **change))


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="num=1 and max_tokens=4"):
        check(helpers.markov(), num=1)
    with pytest.raises(ValueError, match="max_tokens=2"):
        check(helpers.markov(), max_tokens=2)
    with pytest.raises(ValueError, match="context of 7 tokens"):
        check(helpers.table(), max_tokens=6)
    with pytest.raises(ValueError, match="got 1"):
        check_potential(Count(), vocab_size=4, eos=1, max_tokens=3, key=KEY, num=1)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Count(Potential):
    """Phi(x) = exp(0.3 * length + bonus of each token pair) with token 3 after token 0 forbidden;
    end weighs by length.

    The methods come in pieces so that a fault can replace one of them.
    """

    vocab_size: int = dataclasses.field(default=4, metadata={"static": True})
    eos: int = dataclasses.field(default=1, metadata={"static": True})

    def init(self, num: int) -> Any:
        return jnp.full(num, 2, jnp.int32), jnp.zeros(num, jnp.int32)

    def step(self, state: Any, token: Any) -> Any:
        last, count = state
        return (token, count + 1), self.table(last)[jnp.arange(token.shape[0]), token]

    def final(self, state: Any) -> Any:
        return -0.2 * state[1]

    def lookahead(self, state: Any) -> Any:
        return self.table(state[0]).at[:, self.eos].set(self.final(state))

    def table(self, last: Any) -> Any:
        tokens = jnp.arange(self.vocab_size)
        pairs = 0.3 + 0.1 * last[:, None] * tokens
        return jnp.where((last[:, None] == 0) & (tokens == 3), -jnp.inf, pairs)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class NoLookahead(Count):
    def lookahead(self, state):
        return None


@register_dataclass
@dataclasses.dataclass(frozen=True)
class LookaheadOffByOne(Count):
    def lookahead(self, state):
        return jnp.roll(super().lookahead(state), 1, axis=1)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class LookaheadWithoutFinal(Count):
    def lookahead(self, state):
        return self.table(state[0])


@register_dataclass
@dataclasses.dataclass(frozen=True)
class LookaheadOfThePreviousState(Count):
    def lookahead(self, state):
        return super().lookahead((jnp.full_like(state[0], 2), state[1]))


@register_dataclass
@dataclasses.dataclass(frozen=True)
class LookaheadWithFinalAtTheHorizon(Count):
    def lookahead(self, state):
        known, last = super().lookahead(state), (state[1] == 3)[:, None]
        after = -0.2 * (state[1] + 1)[:, None]
        return jnp.where(last & (jnp.arange(self.vocab_size) != self.eos), known + after, known)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class LastScorePaidTwice(NoLookahead):
    """`step` pays what `final` pays too, as if it were told that the horizon ends the string."""

    def step(self, state, token):
        state, log_factor = super().step(state, token)
        return state, log_factor + jnp.where(state[1] == 4, self.final(state), 0.0)

    def log_phi(self, x):
        tokens = jnp.concatenate([jnp.full_like(x.tokens[:, :1], 2), x.tokens], axis=1)
        steps = jax.vmap(lambda last, token: self.table(last)[jnp.arange(last.shape[0]), token], 1)
        written = jnp.arange(x.tokens.shape[1]) < x.length[:, None]
        return jnp.where(written, steps(tokens[:, :-1], tokens[:, 1:]).T, 0.0).sum(1) + (
            -0.2 * x.length
        )


@register_dataclass
@dataclasses.dataclass(frozen=True)
class LookaheadNotANumber(Count):
    def lookahead(self, state):
        return super().lookahead(state) * 0.0


@register_dataclass
@dataclasses.dataclass(frozen=True)
class StepPlusInfinity(NoLookahead):
    def step(self, state, token):
        state, log_factor = super().step(state, token)
        return state, jnp.where(token == 3, jnp.inf, log_factor)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class FinalNotANumber(NoLookahead):
    def final(self, state):
        return jnp.log(state[1] - 1.0)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class NormalisedOverRows(NoLookahead):
    def step(self, state, token):
        state, log_factor = super().step(state, token)
        return state, log_factor - log_factor[0]


@register_dataclass
@dataclasses.dataclass(frozen=True)
class StatesSwapped(NoLookahead):
    def step(self, state, token):
        (last, count), log_factor = super().step(state, token)
        return (last[::-1], count), log_factor


@register_dataclass
@dataclasses.dataclass(frozen=True)
class SharedState(NoLookahead):
    def init(self, num):
        return jnp.full(num, 2, jnp.int32), jnp.zeros((), jnp.int32)

    def final(self, state):
        return jnp.broadcast_to(super().final(state), state[0].shape)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class RowNumberInState(NoLookahead):
    """Passes from scratch in place, but a row that is taken elsewhere behaves by where it was."""

    def final(self, state):
        return -0.2 * state[1] * (1 + jnp.arange(state[1].shape[0]))


@register_dataclass
@dataclasses.dataclass(frozen=True)
class StoredBackwards(NoLookahead):
    """Right from scratch, whatever the rows are; but those of its state are not its strings'."""

    def step(self, state, token):
        (last, count), log_factor = super().step((state[0][::-1], state[1]), token)
        return (last[::-1], count), log_factor


@register_dataclass
@dataclasses.dataclass(frozen=True)
class StateChangesType(NoLookahead):
    def step(self, state, token):
        (last, count), log_factor = super().step(state, token)
        return (last, count.astype(jnp.float32)), log_factor


@register_dataclass
@dataclasses.dataclass(frozen=True)
class WrongShape(NoLookahead):
    def final(self, state):
        return super().final(state).sum()


POTENTIAL_FAULTS = [
    (LookaheadOffByOne, "lookahead must be the factor of the next token|without jit"),
    (LookaheadWithoutFinal, "column 1 is .* but final gives"),
    (
        LookaheadOfThePreviousState,
        r"lookahead must be the factor of the next token: after \[\d\] column",
    ),
    (
        LookaheadWithFinalAtTheHorizon,
        "4 tokens are the horizon, where `final` is paid on top .*: leave it out of every column",
    ),
    (LastScorePaidTwice, "log_phi must be the sum of the factors.*at the horizon"),
    (LookaheadNotANumber, "of lookahead must be finite or -inf, got .nan"),
    (StepPlusInfinity, r"of step at token \d must be finite or -inf, got .inf"),
    (FinalNotANumber, "of final after 0 tokens must be finite or -inf, got .nan"),
    (NormalisedOverRows, "must not depend on its neighbours|must be finite"),
    (StatesSwapped, "must not depend on its neighbours|must give the same factors"),
    (
        SharedState,
        r"init\(8\) returns must have the particle axis of 8 first, leaf \[1\] has shape \(\)",
    ),
    (RowNumberInState, "must not depend on its neighbours"),
    (
        StateChangesType,
        r"step must keep the structure.*leaf \[1\] was int32\[8\] and is float32\[8\]",
    ),
    (WrongShape, r"must have shape \(8,\), got \(\)"),
]


@pytest.mark.parametrize(
    ("fault", "message"), POTENTIAL_FAULTS, ids=[f[0].__name__ for f in POTENTIAL_FAULTS]
)
def test_a_planted_fault_in_a_potential_is_named(fault, message):
    with pytest.raises(AssertionError, match=message):
        check_potential(fault(), vocab_size=4, eos=1, max_tokens=4, key=KEY)


def test_rows_that_are_taken_midway_are_checked_in_short_strings_too():
    with pytest.raises(AssertionError, match=r"after rows of the state were taken \(resampling\)"):
        check_potential(StoredBackwards(), vocab_size=4, eos=1, max_tokens=2, key=KEY)


@pytest.mark.parametrize(
    "potential",
    [Count(), NoLookahead(), Product(), Count() * NoLookahead(), Power(Count(), jnp.float32(0.5))],
)
def test_right_potentials_pass(potential):
    check_potential(potential, vocab_size=4, eos=1, max_tokens=4, key=KEY)


def test_a_large_vocabulary_is_sampled():
    check_potential(Count(700, 699), vocab_size=700, eos=699, max_tokens=2, key=KEY, num=2)


def test_a_second_language_model_is_a_potential():
    other = helpers.hmm().given([0], max_tokens=4)
    check_potential(lm_potential(other), vocab_size=4, eos=1, max_tokens=4, key=KEY)


def test_every_other_string_keeps_to_the_look_ahead():
    """So that faults deep in the support are found; the others leave it."""
    only_two = ppl.banned([0, 3]).within(Space(helpers.VOCAB_SIZE, helpers.EOS, 4))
    how = _PotentialChecks(only_two, helpers.VOCAB_SIZE, helpers.EOS, 4, 1e-5, generator(KEY))
    tokens = how.strings(20)
    assert (tokens[::2] == 2).all() and len(np.unique(tokens[1::2])) == 3
