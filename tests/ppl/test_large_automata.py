"""Automata of more states than sixteen bits can name, against the rule that they stand for."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import tabular
from ppl import token_tables
from ppl.automata import TokenAutomaton
from ppl.byte_dfa import ByteDFA
from ppl.sequences import Sequences
from samplers import smc

TOKENS, EOS = (b"a", None, b"b"), 1


def tree(depth: int) -> ByteDFA:
    """All words of so many letters a and b, each at a state of its own; a word is accepted if its
    number (a = 0, b = 1, the first letter counting most) is divisible by 3.
    """
    num = 2 ** (depth + 1) - 1
    transitions = np.full((num + 1, 256), num, np.int32)
    inner = np.arange(2**depth - 1)
    for bit, letter in enumerate(b"ab"):
        transitions[inner, letter] = 2 * inner + 1 + bit
    accepting = np.zeros(num + 1, bool)
    leaves = np.arange(2**depth - 1, num)
    accepting[leaves] = (leaves - (2**depth - 1)) % 3 == 0
    return ByteDFA(transitions, accepting)


@pytest.mark.parametrize(("depth", "dtype"), [(14, np.int16), (15, np.int32)])
def test_states_beyond_sixteen_bits_are_told_apart(depth: int, dtype: type):
    tables = token_tables.build(tree(depth), token_tables.vocabulary(TOKENS, EOS))
    assert tables.transitions.dtype == dtype
    assert len(tables.distance) == (2**15 if dtype is np.int16 else 2**16)
    phi = TokenAutomaton(*(jnp.asarray(table) for table in tables), eos=EOS)
    lm = tabular.random_markov(jax.random.key(0), len(TOKENS), eos=EOS)
    target = lm.given((0,), max_tokens=depth) * phi
    bits = np.random.default_rng(0).integers(0, 2, (300, depth))
    numbers = bits @ 2 ** np.arange(depth)[::-1]
    x = Sequences(jnp.asarray(2 * bits, jnp.int32), jnp.full(300, depth, jnp.int32))
    log_phi = np.asarray(target.log_potential(x.tokens, x.length))
    np.testing.assert_array_equal(log_phi, np.where(numbers % 3 == 0, 0.0, -np.inf))
    # The look-ahead leads there: no string drawn is forbidden.
    out = smc.run(jax.random.key(1), target, num_particles=40)
    drawn = np.asarray(out.sequences.tokens) // 2
    assert (drawn @ 2 ** np.arange(depth)[::-1] % 3 == 0).all()
    assert (np.asarray(out.sequences.length) == depth).all() and np.isfinite(out.log_z)
