"""Heads: the trunk's hidden states times another matrix, for every prefix, with only the head
trained.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import heads, tabular
from ppl.lm import LM
from tests.models.test_lora import PROMPT, STRINGS, logits, one_layer, small
from tests.models.test_transformer import forward


def hidden(lm) -> np.ndarray:
    """The trunk's outputs, read through an identity in place of the output matrix, by
    full passes.
    """
    config = dataclasses.replace(lm.static, tied=False, final_softcap=None)
    strings = jnp.concatenate([jnp.tile(jnp.asarray(PROMPT), (2, 1)), STRINGS], axis=1)
    params = lm.params | {"head": jnp.eye(config.hidden_size)}
    return np.asarray(forward(config, params, strings)[:, len(PROMPT) - 1 :])


def test_features_are_the_states_that_heads_multiply():
    """Of the prompt and of every token, in one pass and by steps, whatever the head."""
    lm = small(num_layers=1)
    for features in (lm.features, heads.attach(heads.zeros(lm), lm).features):
        prefix = features.prefill(PROMPT)
        np.testing.assert_allclose(prefix.logits, hidden(lm)[0, 0], atol=1e-5)
        found = jax.jit(LM.extend)(features, prefix, STRINGS)
        np.testing.assert_allclose(found, hidden(lm)[:, 1:], atol=1e-5)
        empty = features.init(prefix, 2, 4)
        cache, found = jax.jit(LM.step)(features, prefix, empty, STRINGS[:, 0])
        np.testing.assert_allclose(found, hidden(lm)[:, 1], atol=1e-5)
        cache, found = jax.jit(LM.advance)(features, prefix, cache, STRINGS[:, 1:])
        np.testing.assert_allclose(found, hidden(lm)[:, 2:], atol=1e-5)


def test_a_models_own_head_changes_nothing():
    """Tied embeddings and a cap on the logits."""
    lm = one_layer("gemma2")
    np.testing.assert_array_equal(logits(heads.attach(heads.own(lm), lm)), logits(lm))


def test_a_head_is_a_matrix_on_the_hidden_states():
    lm = small(num_layers=1)
    matrix = jax.random.normal(jax.random.key(0), (9, 16))
    np.testing.assert_allclose(logits(heads.attach(matrix, lm)), hidden(lm) @ matrix.T, atol=1e-5)
    low = {"left": matrix[:, :3], "right": jax.random.normal(jax.random.key(1), (3, 16))}
    expected = hidden(lm) @ (low["left"] @ low["right"]).T
    np.testing.assert_allclose(logits(heads.attach(low, lm)), expected, atol=1e-5)


def test_values_of_every_prefix_have_no_cap():
    lm = one_layer("gemma2")
    head = 100.0 * jax.random.normal(jax.random.key(0), (1, lm.static.hidden_size))
    valued = heads.attach(head, lm)
    found = jax.jit(heads.values)(valued, valued.prefill(PROMPT), STRINGS)
    assert found.shape == (2, 5)
    assert np.abs(found).max() > lm.static.final_softcap
    np.testing.assert_allclose(found, (hidden(lm) @ head.T)[:, :, 0], atol=2e-2, rtol=1e-4)


def test_new_heads_are_zero_and_can_be_trained():
    lm = small(num_layers=1)
    for head in (heads.zeros(lm), heads.low_rank(jax.random.key(0), lm, 2)):
        scores = logits(heads.attach(head, lm))
        np.testing.assert_array_equal(scores, 0.0)
        gradient = jax.grad(
            lambda head: jax.nn.log_softmax(logits(heads.attach(head, lm)))[:, :, 3].sum()
        )(head)
        assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(gradient)) > 1e-3
    assert heads.zeros(lm, 1).shape == (1, 16)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="expected a head for hidden size 16, got one for 7"):
        heads.attach(jnp.zeros((9, 7)), small(num_layers=1))
    with pytest.raises(
        ValueError, match="expected a decoder of models.transformer, got.*models.tabular"
    ):
        heads.own(tabular.random_table(jax.random.key(0), 4, 3, eos=1))
    with pytest.raises(ValueError, match="rank"):
        heads.low_rank(jax.random.key(0), small(num_layers=1), 0)
