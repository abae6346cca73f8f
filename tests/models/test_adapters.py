"""One small causal transformer in flax nnx, flax linen and equinox with the same weights: the same
language model.
"""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from models import adapters
from ppl.lm import LM, LMFunctions, reorder_rows
from ppl.testing import check_lm
from samplers import smc
from tests import helpers

V, D, CONTEXT, EOS = 5, 8, 12, 3
PROMPT = (4, 0, 2)
OPTIONS: dict[str, Any] = {"vocab_size": V, "eos": EOS, "context": CONTEXT}


def attend(x: jax.Array, qkv: jax.Array) -> jax.Array:
    q, k, v = jnp.split(qkv[..., None, :], 3, axis=-1)
    return x + jax.nn.dot_product_attention(q, k, v, is_causal=True)[..., 0, :]


class Nnx(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.tokens = nnx.Embed(V, D, rngs=rngs)
        self.positions = nnx.Embed(CONTEXT, D, rngs=rngs)
        self.dropout = nnx.Dropout(0.5)
        self.qkv = nnx.Linear(D, 3 * D, use_bias=False, rngs=rngs)
        self.head = nnx.Linear(D, V, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.tokens(tokens) + self.positions(jnp.arange(tokens.shape[1]))
        return self.head(self.dropout(attend(x, self.qkv(x))))


class Linen(linen.Module):
    features: int = D

    @linen.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = linen.Embed(V, self.features, name="tokens")(tokens)
        x += linen.Embed(CONTEXT, self.features, name="positions")(jnp.arange(tokens.shape[1]))
        x = attend(x, linen.Dense(3 * self.features, use_bias=False, name="qkv")(x))
        return linen.Dense(V, name="head")(x)


class Equinox(eqx.Module):
    tokens: eqx.nn.Embedding
    positions: eqx.nn.Embedding
    qkv: eqx.nn.Linear
    head: eqx.nn.Linear

    def __init__(self, weights: dict[str, Any]):
        key = jax.random.key(0)  # every weight is replaced
        self.tokens = eqx.nn.Embedding(weight=weights["tokens"])
        self.positions = eqx.nn.Embedding(weight=weights["positions"])
        qkv = eqx.nn.Linear(D, 3 * D, use_bias=False, key=key)
        head = eqx.nn.Linear(D, V, key=key)
        self.qkv = eqx.tree_at(lambda m: m.weight, qkv, weights["qkv"].T)
        self.head = eqx.tree_at(
            lambda m: (m.weight, m.bias), head, (weights["head"].T, weights["bias"])
        )

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = jax.vmap(self.tokens)(tokens) + jax.vmap(self.positions)(jnp.arange(tokens.shape[0]))
        x = attend(x[None], jax.vmap(self.qkv)(x)[None])[0]
        return jax.vmap(self.head)(x)


def weights(seed: int) -> dict[str, jax.Array]:
    shapes = {
        "tokens": (V, D),
        "positions": (CONTEXT, D),
        "qkv": (D, 3 * D),
        "head": (D, V),
        "bias": (V,),
    }
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    # Small enough that several strings are likely.
    return {
        name: 0.5 * jax.random.normal(key, shape)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def wrap_nnx(seed: int = 0) -> LM:
    w = weights(seed)
    module = Nnx(nnx.Rngs(0))
    module.tokens.embedding[...] = w["tokens"]
    module.positions.embedding[...] = w["positions"]
    module.qkv.kernel[...] = w["qkv"]
    module.head.kernel[...] = w["head"]
    module.head.bias = nnx.Param(w["bias"])
    module.eval()
    return adapters.from_nnx(module, **OPTIONS)


def wrap_linen(seed: int = 0) -> LM:
    w = weights(seed)
    params = {
        "tokens": {"embedding": w["tokens"]},
        "positions": {"embedding": w["positions"]},
        "qkv": {"kernel": w["qkv"]},
        "head": {"kernel": w["head"], "bias": w["bias"]},
    }
    return adapters.from_linen(Linen(), {"params": params}, **OPTIONS)


def wrap_equinox(seed: int = 0) -> LM:
    return adapters.from_equinox(Equinox(weights(seed)), **OPTIONS)


WRAP = {"nnx": wrap_nnx, "linen": wrap_linen, "equinox": wrap_equinox}


@pytest.mark.parametrize("name", WRAP)
def test_a_wrapped_module_is_a_language_model(name):
    check_lm(WRAP[name](), PROMPT, key=jax.random.key(1))


@pytest.mark.slow
def test_the_same_weights_give_the_same_smc_result():
    def run(wrap):
        target = wrap().given(PROMPT, max_tokens=5) ** 0.7
        return smc.run(jax.random.key(7), target, num_particles=16)

    nnx_out, linen_out, equinox_out = (run(wrap) for wrap in WRAP.values())
    assert len(set(helpers.as_strings(nnx_out.sequences.tokens, nnx_out.sequences.length))) > 4
    for other in (linen_out, equinox_out):
        np.testing.assert_array_equal(other.sequences.tokens, nnx_out.sequences.tokens)
        np.testing.assert_allclose(other.log_weights, nnx_out.log_weights, atol=1e-4)
        np.testing.assert_allclose(other.log_z, nnx_out.log_z, atol=1e-4)
    different = smc.run(
        jax.random.key(7), wrap_nnx(1).given(PROMPT, max_tokens=5) ** 0.7, num_particles=16
    )
    assert abs(different.log_z - nnx_out.log_z) > 1e-3


@pytest.mark.parametrize("name", WRAP)
def test_wrapping_again_compiles_nothing_and_another_shape_once(name):
    counter = helpers.TraceCounter(LM.step)
    step = jax.jit(counter)

    def run(seed, num):
        lm = WRAP[name](seed)
        prefix = lm.prefill(PROMPT)
        return step(lm, prefix, lm.init(prefix, num, 4), jnp.zeros(num, jnp.int32))[1]

    first, again, other = run(0, 3), run(0, 3), run(1, 3)
    assert counter.count == 1
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)  # the weights are arguments, not constants
    run(0, 2)
    assert counter.count == 2


@pytest.mark.parametrize("name", WRAP)
def test_the_law_sums_to_one_and_its_gradient_reaches_the_weights(name):
    lm = WRAP[name]()
    _, log_z = helpers.brute_force_law(lm, PROMPT, 3)
    assert abs(log_z) < 1e-5
    tokens, length = helpers.as_arrays([(0, 2)], 3, EOS)
    gradient = jax.grad(
        lambda lm: lm.given(jnp.asarray(PROMPT), max_tokens=3).log_density(tokens, length)[0]
    )(lm)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient.params))


def nnx_first_output(module, tokens):
    return module(tokens, 2.0)["logits"]


def linen_first_output(module, variables, tokens):
    return module.apply(variables, tokens)[0]


def equinox_batched(module, tokens):
    return module(tokens)


class NnxOtherCall(nnx.Module):
    def __init__(self):
        self.table = nnx.Param(jnp.arange(float(V * V)).reshape(V, V) % 7)

    def __call__(self, tokens: jax.Array, scale: float) -> dict[str, jax.Array]:
        return {"logits": scale * self.table[...][tokens]}


class LinenOtherCall(linen.Module):
    @linen.compact
    def __call__(self, tokens: jax.Array) -> tuple[jax.Array, None]:
        return linen.Embed(V, V, name="table")(tokens), None


class EquinoxBatched(eqx.Module):
    table: jax.Array

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return self.table[tokens]


def test_a_module_with_another_signature_comes_with_apply():
    table = NnxOtherCall().table[...]
    models = [
        adapters.from_nnx(NnxOtherCall(), vocab_size=V, eos=EOS, apply=nnx_first_output),
        adapters.from_linen(
            LinenOtherCall(),
            {"params": {"table": {"embedding": 2 * table}}},
            vocab_size=V,
            eos=EOS,
            apply=linen_first_output,
        ),
        adapters.from_equinox(
            EquinoxBatched(2 * table), vocab_size=V, eos=EOS, apply=equinox_batched
        ),
    ]
    for lm in models:
        np.testing.assert_array_equal(lm.prefill(PROMPT).logits, 2 * table[PROMPT[-1]])


class NotCausal(nnx.Module):
    def __call__(self, tokens: jax.Array) -> jax.Array:
        return jax.nn.one_hot(tokens, V) + jax.nn.one_hot(tokens, V).mean(1, keepdims=True)


def test_a_module_that_looks_ahead_is_found():
    lm = adapters.from_nnx(NotCausal(), vocab_size=V, eos=EOS)
    with pytest.raises(AssertionError, match="disagrees with a full pass"):
        check_lm(lm, PROMPT, key=jax.random.key(0))


class Recurrent(nnx.Module):
    """s_t = tanh(A s_{t-1} + b[x_t]); logits C s_t."""

    def __init__(self, rngs: nnx.Rngs):
        self.transition = nnx.Param(jax.random.normal(rngs(), (D, D)) / 2)
        self.inputs = nnx.Param(jax.random.normal(rngs(), (V, D)))
        self.outputs = nnx.Param(jax.random.normal(rngs(), (D, V)))

    def one(self, state: jax.Array, token: jax.Array) -> tuple[jax.Array, jax.Array]:
        state = jnp.tanh(state @ self.transition[...] + self.inputs[...][token])
        return state, state @ self.outputs[...]

    def scan(self, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        """States [S, D] and logits [S, V] of one sequence."""

        def body(
            state: jax.Array, token: jax.Array
        ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            state, logits = self.one(state, token)
            return state, (state, logits)

        return jax.lax.scan(body, jnp.zeros(D), tokens)[1]

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return jax.vmap(lambda row: self.scan(row)[1])(tokens)


# The five functions of the module's docstring, word for word.


def prefill(graphdef, params, tokens, length):
    states, logits = nnx.merge(graphdef, params).scan(tokens)  # [S, H], [S, V]
    return states[length - 1], logits[length - 1]


def init(graphdef, params, prefix, num, max_tokens):
    states = jnp.zeros((num, max_tokens + 1, prefix.data.shape[-1]))
    return states.at[:, 0].set(prefix.data), jnp.zeros(num, jnp.int32)


def step(graphdef, params, prefix, cache, token):
    (states, length), rows = cache, jnp.arange(token.shape[0])
    state, logits = nnx.merge(graphdef, params).one(states[rows, length], token)
    return (states.at[rows, length + 1].set(state), length + 1), logits


def truncate(graphdef, params, cache, length):
    return cache[0], length


@pytest.mark.slow
def test_a_module_with_a_cache_is_the_same_model_as_without():
    module = Recurrent(nnx.Rngs(3))
    graphdef, params = nnx.split(module)
    cached = LM(
        params,
        graphdef,
        LMFunctions(prefill, init, step, truncate, reorder_rows),
        vocab_size=V,
        eos=EOS,
    )
    check_lm(cached, PROMPT, key=jax.random.key(2))
    plain = adapters.from_nnx(module, vocab_size=V, eos=EOS)
    tokens, length = helpers.as_arrays(list(helpers.strings(V, 3, EOS)), 3, EOS)
    got, expected = (
        lm.given(PROMPT, max_tokens=3).log_density(tokens, length) for lm in (cached, plain)
    )
    np.testing.assert_allclose(got, expected, atol=1e-4)


class WithList(eqx.Module):
    sizes: list[int] = eqx.field(static=True)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return jax.nn.one_hot(tokens, V)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: adapters.from_nnx(NotCausal(), vocab_size=V + 1, eos=0),
            r"logits \(2, 3, 6\).*got \(2, 3, 5\).*apply=",
        ),
        (
            lambda: adapters.from_nnx(
                NnxOtherCall(), vocab_size=V, eos=0, apply=lambda m, t: m(t, 1.0)
            ),
            "got dict",
        ),
        (
            lambda: adapters.from_equinox(WithList([1]), vocab_size=V, eos=0),
            "static part is hashable.*use tuples",
        ),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_string_may_not_outgrow_the_context():
    with pytest.raises(ValueError, match="context of 12 tokens"):
        wrap_nnx().given(PROMPT, max_tokens=10)
