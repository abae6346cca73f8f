"""Adapters: the base exactly at first, W + (alpha / rank) A B after, in every family; files,
dropout, bad input.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import config, lora, tabular, transformer
from ppl.lm import LM
from tests.models.test_transformer import load

PROMPT = [5, 1, 3]
STRINGS = jnp.asarray([[4, 2, 7, 0], [6, 6, 1, 3]])


@functools.cache
def small(**sizes: int) -> LM:
    entries = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "context": 32, **sizes}
    return transformer.random(jax.random.key(0), config.small(9, **entries), eos=8)


def trained(lm: LM, **options) -> LM:
    """Adapters whose B is not zero."""
    adapter, base = lora.split(lora.attach(jax.random.key(1), lm, **options))
    rng = np.random.default_rng(2)
    return lora.join(
        jax.tree.map(lambda x: jnp.asarray(x + 0.3 * rng.normal(size=x.shape), x.dtype), adapter),
        base,
    )


@jax.jit
def logits(lm: LM) -> jax.Array:
    """After the prompt and after every token of some strings."""
    prefix = lm.read(jnp.asarray(PROMPT), jnp.int32(len(PROMPT)))
    first = jnp.broadcast_to(prefix.logits, (2, 1, lm.vocab_size))
    return jnp.concatenate([first, lm.extend(prefix, STRINGS)], axis=1)


def one_layer(family: str) -> LM:
    lm = load(family)
    params = lm.params | {"layers": lm.params["layers"][:1]}
    return transformer.decoder(
        dataclasses.replace(lm.static, layers=lm.static.layers[:1]), params, lm.eos
    )


def test_fresh_adapters_change_nothing():
    lm = small()
    np.testing.assert_array_equal(logits(lora.attach(jax.random.key(0), lm)), logits(lm))


@pytest.mark.parametrize("family", ["gpt2", pytest.param("gemma3", marks=pytest.mark.slow)])
def test_adapters_are_added_to_the_kernels(family: str):
    """In families with and without biases and gates: the law of W + (alpha / rank) A B, by numpy
    and by `merge`.
    """
    lm = one_layer(family)
    adapted = trained(lm, rank=3, alpha=5.0, targets=("qkv", "down"))
    layer = dict(lm.params["layers"][0])
    for name in ("qkv", "down"):
        pair = jax.tree.map(np.asarray, adapted.params["layers"][0][name]["lora"])
        layer[name] = layer[name] | {
            "kernel": layer[name]["kernel"] + 5.0 / 3 * pair["a"] @ pair["b"]
        }
    expected = logits(dataclasses.replace(lm, params=lm.params | {"layers": (layer,)}))
    np.testing.assert_allclose(logits(adapted), expected, atol=1e-4)
    np.testing.assert_allclose(logits(lora.merge(adapted)), expected, atol=1e-4)
    assert np.abs(expected - logits(lm)).max() > 0.1
    assert jax.tree.structure(lora.merge(adapted)) == jax.tree.structure(lm)


def test_the_base_is_shared_and_only_the_adapter_gets_gradients():
    lm = small()
    adapter, base = lora.split(lora.attach(jax.random.key(0), lm, rank=4))
    assert all(a is b for a, b in zip(jax.tree.leaves(base), jax.tree.leaves(lm), strict=True))
    assert adapter.rank == 4
    target = lm.given(PROMPT, max_tokens=4)

    @jax.jit
    def gradient(adapter, base):
        def loss(adapter):
            return (
                target.under(lora.join(adapter, base))
                .token_log_probs(STRINGS, jnp.asarray([4, 4]))
                .sum()
            )

        return jax.grad(loss)(adapter)

    found = gradient(adapter, base)
    assert jax.tree.structure(found) == jax.tree.structure(adapter)
    for layer in found.layers:
        for pair in layer.values():
            assert np.abs(pair["b"]).max() > 0
            np.testing.assert_array_equal(pair["a"], 0.0)  # behind a B of zero


def test_fewer_targets_have_the_same_adapters():
    lm = small()
    both, one = (
        lora.attach(jax.random.key(3), lm, targets=targets)
        for targets in (("out", "qkv"), ("qkv",))
    )
    a, b = (x.params["layers"][1]["qkv"]["lora"]["a"] for x in (both, one))
    np.testing.assert_array_equal(a, b)
    assert "lora" not in one.params["layers"][1]["out"]


def test_dropout_keeps_the_mean_and_drops_the_share():
    """scale (mask x / (1 - rate)) A B has mean scale x A B, and variance rate / (1 - rate) sum_d
    (x_d W_dj)^2.
    """
    lm = trained(small(), rank=2)
    x = jax.random.normal(jax.random.key(4), (16,))
    plain = lm.params["layers"][1]["out"]["lora"]
    product = plain["scale"] * plain["a"] @ plain["b"]

    def draw(key: jax.Array) -> jax.Array:
        dropped = lora.with_dropout(key, lm, 0.25).params["layers"][1]["out"]
        kernel = {"kernel": jnp.zeros((16, 16)), "lora": dropped["lora"]}
        return transformer._linear(kernel, x)

    draws = jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(5), 4000))
    variance = 0.25 / 0.75 * ((x[:, None] * product) ** 2).sum(0)
    z = (draws.mean(0) - x @ product) / np.sqrt(variance / 4000)
    assert np.abs(z).max() < 4.5
    np.testing.assert_allclose(draws.var(0) / variance, 1.0, atol=0.15)


def test_passes_of_two_shapes_drop_other_numbers():
    """As the prompt's and the strings': which entries of an x of ones got through, for two shapes
    with one key.
    """
    lm = trained(small(), rank=2)
    dropped = lora.with_dropout(jax.random.key(6), lm, 0.5).params["layers"][0]["out"]["lora"]
    seen = dropped | {"a": jnp.eye(16), "b": jnp.eye(16), "scale": jnp.float32(1)}
    kernel = {"kernel": jnp.zeros((16, 16)), "lora": seen}
    few, many = (transformer._linear(kernel, jnp.ones((n, 5, 16))) for n in (20, 40))
    for found in (few, many):
        np.testing.assert_allclose(np.unique(found), [0.0, 2.0])
        assert abs(float((found > 0).mean()) - 0.5) < 5 * 0.5 / np.sqrt(found.size)
    alike = float((few == many[:20]).mean())
    assert abs(alike - 0.5) < 5 * 0.5 / np.sqrt(few.size)


def test_dropout_of_nothing_is_no_dropout_and_keys_matter():
    lm = trained(small(), rank=2)
    np.testing.assert_allclose(
        logits(lora.with_dropout(jax.random.key(0), lm, 0.0)), logits(lm), atol=1e-6
    )
    a, b, c = (logits(lora.with_dropout(jax.random.key(seed), lm, 0.5)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(a, b)
    assert np.abs(a - c).max() > 1e-3
    adapter, _ = lora.split(lora.with_dropout(jax.random.key(1), lm, 0.5))
    assert jax.tree.structure(adapter) == jax.tree.structure(
        lora.split(lm)[0]
    )  # the key is not trained


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"targets": ("qkv", "query")},
            "out of down, out, qkv, up, got query, which matches no layer",
        ),
        ({"targets": ()}, "got none, which matches no layer"),
        ({"rank": 0}, "rank to be a whole number of at least 1, got 0"),
        ({"alpha": 0.0}, "alpha above 0, got 0.0"),
    ],
)
def test_bad_options_are_named(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        lora.attach(jax.random.key(0), small(), **options)


def test_models_that_take_no_adapter_are_named():
    table = tabular.random_table(jax.random.key(0), 4, 3, eos=1)
    with pytest.raises(
        ValueError, match="expected a decoder of models.transformer.*amortized.strings.guide.full"
    ):
        lora.attach(jax.random.key(0), table)
    with pytest.raises(ValueError, match="without adapters, got one with; lora.merge"):
        lora.attach(jax.random.key(0), lora.attach(jax.random.key(0), small()))
    with pytest.raises(ValueError, match="with adapters, got one without"):
        lora.split(small())
    with pytest.raises(ValueError, match=r"rate in \[0, 1\), got 1.0"):
        lora.with_dropout(jax.random.key(0), lora.attach(jax.random.key(0), small()), 1.0)
