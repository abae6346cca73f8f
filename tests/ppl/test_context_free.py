"""Grammars against membership decided in plain Python, on every string over small vocabularies."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import json
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

import models
import ppl
from models import tabular
from ppl import context_free
from ppl.rows import take_rows
from ppl.space import Space
from ppl.target import Target
from ppl.testing import check_potential
from samplers import smc
from tests import helpers

HORIZON = 4
GRAMMARS = {
    "brackets": 'start: "(" start ")" start |',
    "sums": 'start: term ("+" term)*\nterm: NUMBER | "(" start ")"\nNUMBER: /[12]+/',
    "palindromes": 'start: "1" start "1" | "2" start "2" | \'é\'?'.replace("'", '"'),
}


@dataclasses.dataclass(frozen=True)
class Tokens:
    token_bytes: tuple[bytes | None, ...]
    eos: int

    @property
    def vocab_size(self) -> int:
        return len(self.token_bytes)


# Tokens that cross terminals and brackets, one text twice, a character whole and in halves, a token
# of no bytes, a control token; EOS in the middle, with bytes that must not matter.
TOKENS = Tokens(
    (b"(", b")", b"1+", b"(1", b"1)+", b"()", b"(", b"1", b"", b"a", None, b"+2", b"\xc3", b"\xa9"),
    eos=9,
)
MORE = Tokens(
    (b"1", None, b"2", b"12", b"21", "2é".encode(), "é".encode(), b"\xc3", b"\xa91", b"11"), eos=1
)


def brackets(text: str) -> bool:
    while "()" in text:
        text = text.replace("()", "")
    return not text


def sums(text: str) -> bool:
    """By rewriting: a number is n, (n) is n, n+n is n."""
    before, text = None, re.sub("[12]+", "n", text) if "n" not in text else "?"
    while text != before:
        before, text = text, re.sub(r"\(n\)|n\+n", "n", text)
    return text == "n"


def palindromes(text: str) -> bool:
    half, centre = text[: len(text) // 2], text[len(text) // 2 : len(text) - len(text) // 2]
    return text == text[::-1] and set(half) <= {"1", "2"} and centre in ("", "é")


MEMBERS: dict[str, Callable[[str], bool]] = {
    "brackets": brackets,
    "sums": sums,
    "palindromes": palindromes,
}
CASES = [("brackets", TOKENS), ("sums", TOKENS), ("palindromes", MORE)]


def text_of(string: helpers.String, tokenizer: Tokens) -> str | None:
    parts = [tokenizer.token_bytes[token] for token in string]
    try:
        return (
            None if None in parts else b"".join(part for part in parts if part is not None).decode()
        )
    except UnicodeDecodeError:
        return None


def plain(tokenizer: Tokens, horizon: int = HORIZON) -> Target:
    lm = tabular.random_markov(jax.random.key(3), tokenizer.vocab_size, eos=tokenizer.eos)
    return lm.given([0], max_tokens=horizon)


@functools.cache
def strings(tokenizer: Tokens, horizon: int) -> list[helpers.String]:
    return list(helpers.strings(tokenizer.vocab_size, horizon, tokenizer.eos))


def check_every_string(
    target: Target, members: Callable[[str], bool], tokenizer: Tokens, horizon: int
) -> None:
    every = strings(tokenizer, horizon)
    expected = np.array(
        [text is not None and members(text) for text in (text_of(x, tokenizer) for x in every)]
    )
    assert 0 < expected.sum() < len(every)
    found = np.asarray(target.log_potential(*helpers.as_arrays(every, horizon, tokenizer.eos)))
    wrong = np.flatnonzero(found != np.where(expected, 0.0, -np.inf))
    assert not wrong.size, (
        f"{text_of(every[wrong[0]], tokenizer)!r} as {every[wrong[0]]}: {found[wrong[0]]}"
    )


@pytest.mark.parametrize(("name", "tokenizer"), CASES)
def test_the_density_is_membership_for_every_string(name, tokenizer):
    horizon = 3 if tokenizer is TOKENS else HORIZON
    target = plain(tokenizer, horizon) * context_free.grammar(GRAMMARS[name], tokenizer)
    check_every_string(target, MEMBERS[name], tokenizer, horizon)


def test_another_grammar_fails_the_check():
    target = plain(TOKENS, 3) * context_free.grammar('start: "(" start ")" |', TOKENS)
    with pytest.raises(AssertionError, match=r"'\(\)\(\)'"):
        check_every_string(target, brackets, TOKENS, 3)


@pytest.mark.parametrize(("name", "tokenizer"), CASES)
def test_it_is_a_potential(name, tokenizer):
    potential = context_free.grammar(GRAMMARS[name], tokenizer)
    size, eos = tokenizer.vocab_size, tokenizer.eos
    check_potential(potential, vocab_size=size, eos=eos, max_tokens=HORIZON, key=jax.random.key(1))
    # A model may have more ids than its tokenizer.
    check_potential(
        potential, vocab_size=size + 30, eos=eos, max_tokens=HORIZON, key=jax.random.key(2)
    )


@pytest.mark.parametrize("pattern", ["(12)*é?", "[12]{2,3}|é", "1+2*"])
def test_agrees_with_regex_on_a_regular_language(pattern):
    lark = f"start: TEXT\nTEXT: /{pattern}/"
    found = plain(MORE) * context_free.grammar(lark, MORE)
    expected = plain(MORE) * ppl.regex(pattern, MORE)
    x = helpers.as_arrays(strings(MORE, HORIZON), HORIZON, MORE.eos)
    np.testing.assert_array_equal(found.log_potential(*x), expected.log_potential(*x))
    np.testing.assert_allclose(found.log_density(*x), expected.log_density(*x), rtol=1e-6)


def test_regular_expressions_of_no_text_and_of_one():
    target = plain(MORE) * context_free.grammar('start: "12" | ', MORE)
    x = [(), (3,), (0, 2), (0,), (3, 3)]
    found = target.log_potential(*helpers.as_arrays(x, HORIZON, MORE.eos))
    np.testing.assert_array_equal(found, [0, 0, 0, -np.inf, -np.inf])


def test_terminals_take_the_longest_match_as_documented():
    with pytest.warns(UserWarning, match='got A, which can read on where "2" may follow'):
        potential = context_free.grammar('start: A "2"\nA: "1" | "12"', MORE)
    target = plain(MORE) * potential
    found = target.log_potential(*helpers.as_arrays([(3,), (3, 2)], HORIZON, MORE.eos))
    np.testing.assert_array_equal(found, [-np.inf, 0])


def test_what_is_ignored_may_stand_at_both_ends():
    ignoring = context_free.grammar('start: "1"\n%ignore /2/', MORE)
    target = plain(MORE) * ignoring
    x = [(0,), (2, 0, 2), (3,), (4, 2), (2,), (9,)]  # 1, 212, 12, 212, 2, 11
    found = target.log_potential(*helpers.as_arrays(x, HORIZON, MORE.eos))
    np.testing.assert_array_equal(found, [0, 0, 0, 0, -np.inf, -np.inf])


# Purity: what comes out depends on the strings alone.


@functools.cache
def sums_target() -> Target:
    """One target, so that one program serves several tests."""
    return plain(TOKENS, 6) * context_free.grammar(GRAMMARS["sums"], TOKENS)


def advance(potential, state, columns):
    for column in columns:
        state, _ = potential.step(state, jnp.asarray(column, jnp.int32))
    return state


def resampled_midway() -> np.ndarray:
    """`final` of "()()()", "(())" and "()(()", whose rows were copied from others after
    two tokens.
    """
    bound = context_free.grammar(GRAMMARS["brackets"], TOKENS).within(
        Space(TOKENS.vocab_size, TOKENS.eos, 6)
    )
    state = advance(bound, bound.init(3), [[0, 5, 0], [0, 0, 1]])  # "((", "()(", "()"
    state = take_rows(state, jnp.array([1, 0, 1]))
    return np.asarray(bound.final(advance(bound, state, [[1, 1, 0], [5, 1, 1]])))


def test_rows_taken_midway_go_on_as_their_own_strings():
    np.testing.assert_array_equal(resampled_midway(), [0, 0, -np.inf])


def test_a_parser_per_slot_fails_the_check(monkeypatch):
    """The fault of hidden state: a slot goes on with what it was told before, whatever resampling
    put into it.
    """

    class PerSlot(context_free._Parsers):
        def follow(self, tokens, used, needed):
            self.written = np.zeros_like(tokens) if used[0] == 1 else self.written
            self.written[:, used[0] - 1] = tokens[:, used[0] - 1]
            return super().follow(self.written, used, needed)

    monkeypatch.setattr(context_free, "_parsers", functools.cache(PerSlot))
    with pytest.raises(AssertionError):
        np.testing.assert_array_equal(resampled_midway(), [0, 0, -np.inf])


def test_the_cache_changes_nothing(monkeypatch):
    target = plain(TOKENS, 3) * context_free.grammar(GRAMMARS["sums"], TOKENS)
    x = helpers.as_arrays(strings(TOKENS, 3)[::-1], 3, TOKENS.eos)
    expected = np.asarray(target.log_potential(*x))
    monkeypatch.setattr(context_free, "MAX_PARSERS", 2)
    context_free._parsers.cache_clear()
    np.testing.assert_array_equal(target.log_potential(*x), expected)
    context_free._parsers.cache_clear()


@pytest.mark.slow
def test_states_are_determined_by_strings_under_every_transformation():
    bound = context_free.grammar(GRAMMARS["sums"], TOKENS).within(
        Space(TOKENS.vocab_size, TOKENS.eos, HORIZON)
    )
    columns = jnp.array([[[3, 7], [1, 4]], [[7, 3], [11, 3]], [[0, 2], [3, 7]]])  # [runs, steps, N]

    def run(columns):
        state, factors = bound.init(columns.shape[1]), []
        for column in columns:
            state, factor = bound.step(state, column)
            factors.append(factor)
        return state, jnp.stack(factors), bound.lookahead(state)

    expected = [run(row) for row in columns]
    jitted = jax.jit(run)
    for _ in range(2):
        jax.tree.map(np.testing.assert_array_equal, [jitted(row) for row in columns], expected)
    stacked = jax.tree.map(lambda *rows: jnp.stack(rows), *expected)
    jax.tree.map(np.testing.assert_array_equal, jax.jit(jax.vmap(run))(columns), stacked)
    jax.tree.map(np.testing.assert_array_equal, jax.lax.map(run, columns), stacked)


@pytest.mark.slow
def test_particles_over_several_devices_are_those_on_one():
    target = sums_target()
    expected = smc.run(jax.random.key(4), target, num_particles=8)
    found = smc.run(
        jax.random.key(4),
        target,
        num_particles=8,
        mesh=Mesh(np.array(jax.devices()[:2]), ("rows",)),
    )
    np.testing.assert_array_equal(found.sequences.tokens, expected.sequences.tokens)
    np.testing.assert_allclose(found.log_z, expected.log_z, atol=1e-4)


@pytest.mark.slow
def test_runs_in_several_threads_agree_with_runs_in_one():
    target, keys = sums_target(), jax.random.split(jax.random.key(5), 6)
    expected = [smc.run(key, target, num_particles=8) for key in keys]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda key: smc.run(key, target, num_particles=8), keys))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_one_callback_a_step_for_all_particles(monkeypatch):
    calls = []
    follow = context_free._Parsers.follow
    monkeypatch.setattr(
        context_free._Parsers,
        "follow",
        lambda self, tokens, used, needed: (
            calls.append(len(used)) or follow(self, tokens, used, needed)
        ),
    )
    result = jax.block_until_ready(smc.run(jax.random.key(0), sums_target(), num_particles=8))
    assert calls == [8] * int(result.rounds)


# The law of a sampler.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "tokenizer", "threshold"),
    [("brackets", TOKENS, 0.0), ("palindromes", MORE, 1.1)],
)
def test_smc_is_unbiased(name, tokenizer, threshold):
    base = plain(tokenizer)
    target = base * context_free.grammar(GRAMMARS[name], tokenizer)
    law, _ = helpers.brute_force_law(base.lm, [0], HORIZON)
    law = {
        x: p
        for x, p in law.items()
        if (text := text_of(x, tokenizer)) is not None and MEMBERS[name](text)
    }
    truth = sum(law.values())
    two_tokens = sum(p for x, p in law.items() if len(x) == 2)
    keys = jax.random.split(jax.random.key(7), 1000)
    runs = jax.jit(
        jax.vmap(
            functools.partial(smc.run, num_particles=4, threshold=threshold), in_axes=(0, None)
        )
    )
    out = runs(keys, target)
    z = np.exp(np.asarray(out.log_z, np.float64))
    helpers.assert_z(z, truth, resolution=0.06 * truth)
    share = (np.exp(out.log_weights) * (out.sequences.length == 2)).mean(1)
    helpers.assert_z(z * np.asarray(share), two_tokens, resolution=0.12 * truth)
    alive = np.asarray(out.log_weights) > -np.inf
    tokens, length = (
        np.asarray(out.sequences.tokens)[alive],
        np.asarray(out.sequences.length)[alive],
    )
    assert set(helpers.as_strings(tokens, length)) <= law.keys()


def test_runs_repeat():
    target = sums_target()
    first = smc.run(jax.random.key(1), target, num_particles=8)
    smc.run(jax.random.key(2), target, num_particles=8)
    jax.tree.map(
        np.testing.assert_array_equal, smc.run(jax.random.key(1), target, num_particles=8), first
    )


def test_equal_grammars_share_parsers_and_programs():
    one, two = (
        context_free.grammar(GRAMMARS["sums"], dataclasses.replace(TOKENS)) for _ in range(2)
    )
    counter = helpers.TraceCounter(
        lambda potential: potential.within(Space(TOKENS.vocab_size, TOKENS.eos, 3)).init(2)
    )
    jitted = jax.jit(counter)
    for potential in (one, two):
        jitted(potential)
    assert counter.count == 1
    before = context_free._parsers.cache_info().misses
    context_free.grammar(GRAMMARS["sums"], TOKENS)
    assert context_free._parsers.cache_info().misses == before


# What does not work.


@pytest.mark.parametrize(
    ("lark", "message"),
    [
        ("start: value", 'invalid: at 1.*unknown name: "value"'),
        ('start: "a" ~', "invalid: 1"),
        ('value: "a"', "invalid: no start rule"),
        ("start: /(/", "invalid"),
        ('start: "(" start', "start, which never end; give them an alternative"),
        ('start: "(" | bad\nbad: "1" bad', "got bad, which never end"),
        ("start: <|im_end|>", r"speaks of tokens .<\|im_end\|>"),
        ("start: <[5]>", "speaks of tokens .<.5.>"),
        ('start: x "1"\nx[max_tokens=3]: /2*/', "speaks of tokens .max_tokens.*by {m,n}"),
        ('start: x "1"\nx[stop=""]: /2*/', "speaks of tokens .stop"),
        ('start: "zebra"', "some string of this tokenizer's tokens starts"),
        ("start: A\nA: /1/ & /2/", "some string of this tokenizer's tokens starts"),
    ],
)
def test_grammars_that_cannot_be_used(lark, message):
    with pytest.raises(ValueError, match=message):
        context_free.grammar(lark, TOKENS)


def test_another_tokenizer_and_an_unbound_grammar():
    potential = context_free.grammar(GRAMMARS["brackets"], TOKENS)
    with pytest.raises(ValueError, match="tokenizer that models.load returned"):
        potential.within(Space(TOKENS.vocab_size - 1, TOKENS.eos, 4))
    with pytest.raises(ValueError, match="tokenizer that models.load returned"):
        potential.within(Space(TOKENS.vocab_size, TOKENS.eos + 1, 4))
    with pytest.raises(ValueError, match="multiply it onto a target first"):
        potential.init(2)


def test_a_horizon_too_short_has_no_mass():
    target = plain(TOKENS, 1) * context_free.grammar('start: "((1"', TOKENS)
    x = helpers.as_arrays(strings(TOKENS, 1), 1, TOKENS.eos)
    assert np.isneginf(np.asarray(target.log_potential(*x))).all()


def test_a_text_that_no_token_goes_on_has_no_mass_and_is_not_invalid():
    bound = context_free.grammar('start: "(" ("z" | "1" "z")', TOKENS).within(
        Space(TOKENS.vocab_size, TOKENS.eos, 4)
    )
    state = bound.init(2)
    for token, expected in ([0, 3], [0, 0]), ([7, 8], [0, -np.inf]):
        state, factor = bound.step(state, jnp.asarray(token, jnp.int32))
        np.testing.assert_array_equal(factor, expected)
    assert np.isneginf(np.asarray(bound.lookahead(state))).all()


@pytest.mark.slow
def test_a_parser_that_gives_up_kills_its_particle_and_is_counted(monkeypatch, caplog):
    limits = context_free.llguidance.LLParserLimits(max_items_in_row=20, verbose_errors=False)
    monkeypatch.setattr(context_free, "_limits", lambda: limits)
    context_free._parsers.cache_clear()
    lark = "start: " + " | ".join(f"r{i}" for i in range(15)) + ' | "1" | "2"'
    lark += "".join(f'\nr{i}: "1" ("1" | "+" start "+" start | start start "2")' for i in range(15))
    target = plain(TOKENS) * context_free.grammar(lark, TOKENS)
    result = smc.run(jax.random.key(0), target, num_particles=16)
    context_free._parsers.cache_clear()
    assert int(result.num_invalid) > 0 and "gave up" in caplog.text
    assert not np.isnan(np.asarray(result.log_weights)).any()


# A real model.

JSON = r"""
start: value
value: object | array | STRING | NUMBER | "true" | "false" | "null"
object: "{" [pair ("," pair)*] "}"
pair: STRING ":" value
array: "[" [value ("," value)*] "]"
STRING: /"([^"\\\x00-\x1f]|\\["\\\/bfnrt])*"/
NUMBER: /-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?/
%ignore /[ \n]+/
"""


@pytest.mark.slow
def test_a_real_model_writes_json():
    lm, tokenizer = models.load("smollm2-135m")
    prompt = tokenizer.chat(
        "Describe a cat called Tom, aged 3, as a short JSON object. Answer with JSON only."
    )
    target = lm.given(prompt, max_tokens=64) * context_free.grammar(JSON, tokenizer)
    result = smc.run(jax.random.key(0), target, num_particles=16)
    assert int(result.num_invalid) == 0
    tokens, length = result.sequences.tokens, result.sequences.length
    alive = np.flatnonzero(np.asarray(result.log_weights) > -np.inf)
    assert alive.size
    for row in alive:
        json.loads(tokenizer.decode(np.asarray(tokens)[row, : int(length[row])]))
