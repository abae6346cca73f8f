"""The algebra of targets: what powers, products and tilts do to log gamma, and what is refused."""

from __future__ import annotations

import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ppl
from models import tabular
from ppl import exact
from tests import helpers
from tests.helpers import EOS, MAX_TOKENS, MODELS, PROMPT, VOCAB_SIZE
from tests.samplers.problems import SECOND_PROMPT, score_arrays

ALL = exact.strings(VOCAB_SIZE, MAX_TOKENS, EOS)

X60 = ALL.tokens[60:61], ALL.length[60:61]


def given(name: str = "table", prompt: Any = PROMPT) -> ppl.Target:
    return MODELS[name]().given(prompt, max_tokens=MAX_TOKENS)


def log_gamma(target: ppl.Target) -> np.ndarray:
    return np.asarray(target.log_density(ALL.tokens, ALL.length), np.float64)


def assert_equal(a: np.ndarray, b: np.ndarray) -> None:
    assert not np.isnan(a).any()
    np.testing.assert_array_equal(np.isneginf(a), np.isneginf(b))
    np.testing.assert_allclose(np.exp(a), np.exp(b), rtol=2e-5)


@pytest.fixture(scope="module")
def logs() -> dict[str, np.ndarray]:
    """log p, log q, log Phi of a hard and of a soft potential, of every string."""
    p = given()
    return {
        "p": log_gamma(p),
        "q": log_gamma(given("hmm", SECOND_PROMPT)),
        "hard": np.asarray((p * ppl.banned([0])).log_potential(ALL.tokens, ALL.length), np.float64),
        "soft": np.asarray(score_arrays(ALL.tokens, ALL.length), np.float64),
    }


@pytest.mark.parametrize(
    ("name", "max_tokens"), [("markov", 4), ("table", 4), ("hmm", 4), ("hmm", 1)]
)
def test_a_language_model_sums_to_one(name: str, max_tokens: int):
    x = exact.strings(VOCAB_SIZE, max_tokens, EOS)
    target = MODELS[name]().given(PROMPT, max_tokens=max_tokens)
    log_p = np.asarray(target.log_density(x.tokens, x.length), np.float64)
    assert target.is_language_model
    np.testing.assert_allclose(np.exp(log_p).sum(), 1, rtol=1e-5)
    law, _ = helpers.brute_force_law(MODELS[name](), PROMPT, max_tokens)
    found = {
        s: p
        for s, p in zip(helpers.as_strings(x.tokens, x.length), np.exp(log_p), strict=True)
        if p > 0
    }
    assert found.keys() == law.keys()
    np.testing.assert_allclose([found[s] for s in law], list(law.values()), rtol=1e-4)


def test_an_ended_string_and_a_cut_one_differ_by_the_eos_factor():
    """(3, 0, 3) within 4 tokens ends by EOS; within 3 it is cut, and no EOS is paid for."""
    tokens, length = jnp.array([[3, 0, 3]]), jnp.array([3])
    cut = MODELS["hmm"]().given(PROMPT, max_tokens=3).log_density(tokens, length)
    ended = given("hmm").log_density(jnp.array([[3, 0, 3, EOS]]), length)
    eos = jax.nn.log_softmax(MODELS["hmm"]().prefill([*PROMPT, 3, 0, 3]).logits)[EOS]
    np.testing.assert_allclose(ended - cut, eos, rtol=1e-5)


def test_powers(logs: dict[str, np.ndarray]):
    assert_equal(
        log_gamma(given() ** 1.5), np.where(np.isneginf(logs["p"]), -np.inf, 1.5 * logs["p"])
    )
    assert_equal(log_gamma((given() ** 3.0) ** 0.5), log_gamma(given() ** 1.5))
    assert_equal(log_gamma(given() ** 1), logs["p"])


def test_power_zero_is_the_indicator_of_the_support(logs: dict[str, np.ndarray]):
    target = (given() * ppl.banned([0])) ** 0
    assert_equal(log_gamma(target), np.where(np.isneginf(logs["p"] + logs["hard"]), -np.inf, 0.0))


def test_tempering_a_tilted_target_tempers_everything(logs: dict[str, np.ndarray]):
    target = (given() * ppl.banned([0]) * ppl.reward(score_arrays)) ** 0.6
    with np.errstate(invalid="ignore"):
        assert_equal(log_gamma(target), 0.6 * (logs["p"] + logs["hard"] + logs["soft"]))
    assert_equal(
        log_gamma(target**0.5),
        log_gamma((given() * ppl.banned([0]) * ppl.reward(score_arrays)) ** 0.3),
    )


def test_products_commute_and_associate(logs: dict[str, np.ndarray]):
    p, hard, soft = given(), ppl.banned([0]), ppl.reward(score_arrays)
    expected = logs["p"] + logs["hard"] + logs["soft"]
    for target in (p * hard * soft, p * (soft * hard), hard * p * soft, hard * (soft * p)):
        assert_equal(log_gamma(target), expected)
    assert_equal(log_gamma(p * soft**0.5 * soft**0.5), logs["p"] + logs["soft"])
    assert_equal(log_gamma(p * ppl.Product()), logs["p"])


def test_a_product_of_models(logs: dict[str, np.ndarray]):
    p, q = given(), given("hmm", SECOND_PROMPT)
    assert_equal(log_gamma(p * q), logs["p"] + logs["q"])
    assert_equal(log_gamma(q * p), logs["p"] + logs["q"])


def test_a_product_of_tilted_powers(logs: dict[str, np.ndarray]):
    p, q = given() ** 2.0, (given("hmm", SECOND_PROMPT) * ppl.reward(score_arrays)) ** 0.5
    expected = np.where(
        np.isneginf(logs["p"]), -np.inf, 2 * logs["p"] + 0.5 * (logs["q"] + logs["soft"])
    )
    assert_equal(log_gamma(p * q), expected)


def test_a_contrast_of_models_divides(logs: dict[str, np.ndarray]):
    """p / q^0.5: a negative power; what q forbids stays forbidden."""
    target = given() * given("hmm", SECOND_PROMPT) ** -0.5
    assert_equal(log_gamma(target), logs["p"] - 0.5 * logs["q"])


def test_density_is_the_models_times_the_potentials():
    target = given() ** 1.3 * ppl.reward(score_arrays)
    x = ALL.tokens, ALL.length
    log_p = target.token_log_probs(*x)
    after = np.arange(MAX_TOKENS) > np.asarray(ALL.length)[:, None]
    assert (np.asarray(log_p)[after] == 0).all()
    parts = np.asarray(target.log_prob_factor(log_p).sum(1) + target.log_potential(*x), np.float64)
    assert_equal(log_gamma(target), parts)


def test_what_stands_after_a_string_is_ignored():
    target = given() * ppl.reward(score_arrays)
    noise = jnp.where(jnp.arange(MAX_TOKENS) < ALL.length[:, None], ALL.tokens, 3)
    np.testing.assert_array_equal(
        target.log_density(noise, ALL.length), target.log_density(ALL.tokens, ALL.length)
    )
    padded = jnp.where(jnp.arange(MAX_TOKENS) < ALL.length[:, None], ALL.tokens, -1)
    np.testing.assert_array_equal(
        target.log_density(padded, ALL.length), target.log_density(ALL.tokens, ALL.length)
    )


def test_log_density_inside_jit_and_grad():
    """d log gamma / d alpha = log p of the string, through jit."""
    p, x = given("hmm"), (ALL.tokens[50:51], ALL.length[50:51])

    @jax.jit
    def density(alpha: Any) -> Any:
        return (p**alpha).log_density(*x)[0]

    np.testing.assert_allclose(jax.grad(density)(1.7), p.log_density(*x)[0], rtol=1e-5)


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_an_invalid_factor_counts_as_zero(value: float):
    target = given("hmm") * ppl.reward(lambda tokens, length: jnp.where(length == 2, value, 0.0))
    log_density = log_gamma(target)
    assert np.isneginf(log_density[np.asarray(ALL.length) == 2]).all()
    assert np.isfinite(log_density[np.asarray(ALL.length) != 2]).all()


def test_strings_are_scored_a_block_at_a_time(monkeypatch):
    """As many rows at a time as their logits allow; the last block is not full."""
    x, expected = (ALL.tokens, ALL.length), given().log_density(ALL.tokens, ALL.length)
    monkeypatch.setattr("ppl.target.SCORED_LOGITS", 7 * MAX_TOKENS * VOCAB_SIZE)
    np.testing.assert_array_equal(
        jax.jit(lambda target: target.log_density(*x))(given() ** 1.0), expected
    )


def test_under_another_model_is_that_models_plain_law():
    target = given() ** 2.0 * ppl.banned([0])
    other = target.under(MODELS["hmm"]())
    assert other.is_language_model
    np.testing.assert_array_equal(log_gamma(other), log_gamma(given("hmm")))
    score = jax.jit(jax.grad(lambda lm: target.under(lm).log_density(*X60)[0]))
    plain = jax.grad(
        lambda lm: lm.given(jnp.array(PROMPT), max_tokens=MAX_TOKENS).log_density(*X60)[0]
    )
    jax.tree.map(np.testing.assert_allclose, score(MODELS["hmm"]()), plain(MODELS["hmm"]()))


def test_another_model_needs_the_same_strings_and_room_for_them():
    wider = tabular.random_markov(jax.random.key(0), 5, eos=EOS)
    with pytest.raises(
        ValueError,
        match=r"target's strings, \(vocab_size, .*\) = \(4, 1, 4\), got \(5, 1, 4\)",
    ):
        given().under(wider)
    with pytest.raises(ValueError, match="holds the prompt and the strings, 8 positions, got a.*7"):
        MODELS["hmm"]().given(PROMPT, max_tokens=6).under(MODELS["table"]())


def test_padding_beyond_the_context_is_no_prompt():
    """A table has room for prompt and strings, not for a prompt padded to its bucket of 16."""
    hmm = given("hmm")
    assert hmm.prefix.tokens.shape == (16,)
    np.testing.assert_array_equal(log_gamma(hmm.under(MODELS["table"]())), log_gamma(given()))
    read = jax.jit(MODELS["table"]().read)
    assert not np.isnan(read(hmm.prefix.tokens, jnp.int32(2)).logits).any()
    assert np.isnan(read(hmm.prefix.tokens, jnp.int32(8)).logits).all()


def test_is_language_model():
    p = given()
    assert p.is_language_model
    for target in (p**2, p * ppl.must_end(), p * given("hmm", SECOND_PROMPT)):
        assert not target.is_language_model


@pytest.mark.bad_input
@pytest.mark.parametrize("operation", [operator.mul, operator.add, operator.truediv])
def test_numbers_do_not_multiply(operation: Any):
    for a, b in ((given(), 2.0), (2.0, given())):
        with pytest.raises(TypeError, match="unsupported operand"):
            operation(a, b)


def test_models_of_a_product_share_vocabulary_eos_and_horizon():
    p = given("markov")
    longer = MODELS["markov"]().given(PROMPT, max_tokens=5)
    wider = tabular.random_markov(jax.random.key(0), 5, eos=EOS).given(PROMPT, max_tokens=4)
    other_eos = tabular.random_markov(jax.random.key(0), 4, eos=0).given(PROMPT, max_tokens=4)
    for q, theirs in ((longer, (4, 1, 5)), (wider, (5, 1, 4)), (other_eos, (4, 0, 4))):
        with pytest.raises(ValueError) as error:
            p * q
        with pytest.raises(ValueError, match="a second language model over the target's strings"):
            p * ppl.lm_potential(q)
        assert str(error.value) == (
            "expected a second language model over the target's strings, (vocab_size, eos,"
            f" max_tokens) = (4, 1, 4), got {theirs}; use models with one tokenizer and give both"
            " the same max_tokens"
        )


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("tokens", "length", "message"),
    [
        (
            (2, 3),
            (2,),
            r"expected strings with tokens \[C, 4\] .*, got \(2, 3\) and \(2,\); pad shorter",
        ),
        (
            (2, 5),
            (2,),
            r"expected strings with tokens \[C, 4\] and length \[C\], got \(2, 5\) and \(2,\)",
        ),
        (
            (2, 4),
            (3,),
            r"expected strings with tokens \[C, 4\] and length \[C\], got \(2, 4\) and \(3,\)",
        ),
        ((4,), (), r"expected strings with tokens \[C, 4\] and length \[C\], got \(4,\) and \(\)"),
    ],
)
def test_shapes_of_strings_are_checked(
    tokens: tuple[int, ...], length: tuple[int, ...], message: str
):
    target = given()
    for function in (target.log_density, target.token_log_probs, target.log_potential):
        with pytest.raises(ValueError, match=message):
            function(jnp.zeros(tokens, jnp.int32), jnp.zeros(length, jnp.int32))
        with pytest.raises(ValueError, match=message):  # shapes are known when traced
            jax.eval_shape(function, jnp.zeros(tokens, jnp.int32), jnp.zeros(length, jnp.int32))


@pytest.mark.parametrize(
    ("tokens", "length", "message"),
    [
        (
            [[0, 4, 0, 0]],
            [2],
            r"expected token ids in \[0, 4\), got 4; encode with this model's own tokenizer",
        ),
        ([[0, -1, 0, 0]], [2], r"expected token ids in \[0, 4\), got -1; encode"),
        (
            [[0, 0, 0, 0]],
            [5],
            r"expected lengths in \[0, 4\], got 5; a length counts the tokens before EOS",
        ),
        (
            [[0, 1, 0, 0]],
            [3],
            r"expected EOS \(1\) only from a string's length on, got one before it; let the first"
            " EOS",
        ),
        ([[0, 0, 0, 0]], [-1], r"expected lengths in \[0, 4\], got -1; a length"),
    ],
)
def test_ids_and_lengths_are_checked(tokens: list, length: list, message: str):
    with pytest.raises(ValueError, match=message):
        given().log_density(jnp.asarray(tokens, jnp.int32), jnp.asarray(length, jnp.int32))


def test_the_space_is_what_its_strings_are():
    space = given().space
    assert space == ppl.Space(VOCAB_SIZE, EOS, MAX_TOKENS) and hash(space) == hash(
        given("hmm").space
    )
    assert given().under(MODELS["hmm"]()).space == space
