"""Stochastic beam search: LAW 1, the law of draws without replacement, few strings, and numbers far
from 1.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ppl
from models import tabular
from ppl.lm import LM
from ppl.pytrees import register_dataclass
from ppl.target import Target
from samplers.draws import stochastic_beam
from tests import helpers
from tests.helpers import EOS, MODELS, PROMPT, VOCAB_SIZE
from tests.samplers.problems import check_law, code, gamma, masses, plain, target_of

NUM = 10_000


def beam_masses(key: Any, target: Target, num_samples: int, num: int = NUM) -> np.ndarray:
    return masses(
        lambda k: stochastic_beam.run(k, target, num_samples=num_samples),
        jax.random.split(key, num),
    )


LAWS = [("table", "every_2", 4)]
SLOW = [("hmm", "second_lm", 5), ("markov", "reward", 2), ("hmm", "product", 4)]
SLOW += [("table", "regex", 4)]
LANES = [*LAWS, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]


@pytest.mark.parametrize(("model", "problem", "num_samples"), LANES)
def test_law_1(model: str, problem: str, num_samples: int):
    found = beam_masses(jax.random.key(0), target_of(model, problem), num_samples)
    check_law(found, gamma(model, problem), resolution=0.03)


def short(model: str, max_tokens: int) -> tuple[Target, dict[helpers.String, float]]:
    lm = MODELS[model]()
    return lm.given(PROMPT, max_tokens=max_tokens), helpers.brute_force_law(lm, PROMPT, max_tokens)[
        0
    ]


def check_proportions(counts: dict[Any, int], law: dict[Any, float], total: int) -> None:
    """Counts of `total` draws against their law; outcomes that are rare are counted together."""
    assert set(counts) <= set(law)
    common = {x for x, p in law.items() if p * total >= 30}
    pairs = [(counts.get(x, 0), law[x]) for x in common]
    pairs.append(
        (
            sum(n for x, n in counts.items() if x not in common),
            sum(law[x] for x in set(law) - common),
        )
    )
    for count, p in pairs:
        z = (count / total - p) / np.sqrt(max(p * (1 - p), 1e-6) / total)
        assert abs(z) < 5, f"z = {z}"


def without_replacement(
    law: dict[helpers.String, float], k: int
) -> dict[tuple[helpers.String, ...], float]:
    """P(x_1, .., x_k) = prod_i p(x_i) / (1 - p(x_1) - .. - p(x_{i-1}))."""
    found = {}
    for draw in itertools.permutations(law, k):
        left, p = 1.0, 1.0
        for x in draw:
            p *= law[x] / left
            left -= law[x]
        found[draw] = p
    return found


def ordered_draws(target: Target, k: int, num: int) -> list[tuple[helpers.String, ...]]:
    many = jax.jit(jax.vmap(lambda key: stochastic_beam.run(key, target, num_samples=k).sequences))
    x = many(jax.random.split(jax.random.key(1), num))
    rows = helpers.as_strings(x.tokens.reshape(-1, target.max_tokens), x.length.reshape(-1))
    return [tuple(rows[i : i + k]) for i in range(0, len(rows), k)]


def tally(outcomes: Any) -> dict[Any, int]:
    counts: dict[Any, int] = {}
    for x in outcomes:
        counts[x] = counts.get(x, 0) + 1
    return counts


@pytest.mark.slow
def test_strings_are_drawn_one_after_another_without_replacement():
    """Every ordered pair of strings, and every string's probability to be among three, by
    enumeration.
    """
    target, law = short("hmm", 2)
    draws = ordered_draws(target, 3, 20_000)
    assert all(len(set(draw)) == 3 for draw in draws)
    check_proportions(tally(draw[:2] for draw in draws), without_replacement(law, 2), len(draws))
    inclusion = dict.fromkeys(law, 0.0)
    for draw, p in without_replacement(law, 3).items():
        for x in draw:
            inclusion[x] += p
    counts = tally(x for draw in draws for x in draw)
    for x, p in inclusion.items():
        z = (counts.get(x, 0) / len(draws) - p) / np.sqrt(p * (1 - p) / len(draws))
        assert abs(z) < 5, (x, z)
    with pytest.raises(AssertionError, match="z = "):  # the test can fail: draws with replacement
        wrong = {
            (x, y): law[x] * law[y] / (1 - sum(p**2 for p in law.values()))
            for x in law
            for y in law
            if x != y
        }
        check_proportions(tally(draw[:2] for draw in draws), wrong, len(draws))


@pytest.mark.parametrize("num_samples", [3, 6])
def test_no_more_strings_than_rows(num_samples: int):
    """At T = 1 there are four strings, one of them forbidden: three found, weights exact, other
    rows -inf.
    """
    target, law = short("markov", 1)
    allowed = {x: p for x, p in law.items() if x != (2,)}
    out = stochastic_beam.run(jax.random.key(2), target * ppl.banned([2]), num_samples=num_samples)
    weights = np.exp(np.asarray(out.log_weights + out.log_z, np.float64)) / num_samples
    found = dict(
        zip(
            helpers.as_strings(out.sequences.tokens, out.sequences.length)[:3],
            weights,
            strict=False,
        )
    )
    assert found.keys() == allowed.keys()
    for x, p in allowed.items():
        np.testing.assert_allclose(found[x], p, rtol=1e-5)
    assert (out.sequences.length[3:] == 0).all() and (out.sequences.tokens[3:] == EOS).all()
    assert (out.log_weights[3:] == -jnp.inf).all() and (out.log_q[3:] == -jnp.inf).all()
    np.testing.assert_allclose(out.log_z, np.log(sum(allowed.values())), atol=1e-5)


def test_all_strings_of_a_longer_horizon():
    target, law = short("table", 3)
    out = stochastic_beam.run(jax.random.key(3), target, num_samples=50)
    rows = helpers.as_strings(out.sequences.tokens, out.sequences.length)[: len(law)]
    assert set(rows) == set(law)
    np.testing.assert_allclose(jnp.exp(out.log_q[: len(law)]), [law[x] for x in rows], rtol=1e-4)
    np.testing.assert_allclose(out.log_z, 0, atol=1e-5)


def test_a_wider_beam_starts_with_the_same_strings():
    few = stochastic_beam.run(jax.random.key(4), plain("hmm"), num_samples=3)
    more = stochastic_beam.run(jax.random.key(4), plain("hmm"), num_samples=20)
    np.testing.assert_array_equal(few.sequences.tokens, more.sequences.tokens[:3])
    np.testing.assert_allclose(few.log_q, more.log_q[:3], rtol=1e-5)


def test_what_is_returned_agrees_with_the_target():
    target = plain("hmm")
    out = stochastic_beam.run(jax.random.key(5), target, num_samples=20)
    x = out.sequences
    np.testing.assert_allclose(out.log_q, target.log_density(x.tokens, x.length), rtol=1e-4)
    np.testing.assert_allclose(jnp.exp(out.log_weights).mean(), 1, rtol=1e-5)
    assert len(set(code(np.asarray(x.tokens)).tolist())) == 20
    assert ((np.asarray(x.tokens) == EOS) == (np.arange(4) >= np.asarray(x.length)[:, None])).all()
    assert not out.all_dead and int(out.num_invalid) == 0


def test_cost():
    """Three rows for k = 2: at each position one token for every prefix that goes on, and one pass
    for all.
    """
    chain = tabular.markov(jnp.asarray([[0.0, 0, 0.5, 0.5]] * 4), eos=EOS)  # never ends
    spent = stochastic_beam.run(
        jax.random.key(6), chain.given(PROMPT, max_tokens=3), num_samples=2
    ).cost
    assert (int(spent.tokens), int(spent.forwards), int(spent.potential_calls)) == (2 + 3 + 3, 3, 0)
    ends = tabular.markov(jnp.asarray([[0.0, 1, 0, 0]] * 4), eos=EOS)
    target = ends.given(PROMPT, max_tokens=3) * ppl.banned([0])
    spent = stochastic_beam.run(jax.random.key(6), target, num_samples=2).cost
    assert (int(spent.tokens), int(spent.forwards), int(spent.potential_calls)) == (1, 1, 1)


def test_one_trace_for_prompts_of_one_bucket(monkeypatch: pytest.MonkeyPatch):
    counter = helpers.TraceCounter(stochastic_beam.step)
    monkeypatch.setattr(stochastic_beam, "step", counter)
    lm = MODELS["markov"]()
    stochastic_beam.run(jax.random.key(7), lm.given([2], max_tokens=2), num_samples=2)
    before = counter.count
    stochastic_beam.run(jax.random.key(8), lm.given([3, 0, 2], max_tokens=2), num_samples=2)
    assert counter.count == before > 0


# Strings of density 0 that q does not know of.


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Trap(ppl.Potential):
    """Nothing may follow token 3, not even the end; known in advance only once it is too late.
    State = last token.
    """

    def init(self, num: int) -> Any:
        return jnp.full(num, -1, jnp.int32)

    def step(self, state: Any, token: Any) -> Any:
        return token, jnp.where(state == 3, -jnp.inf, 0.0)

    def final(self, state: Any) -> Any:
        return jnp.where(state == 3, -jnp.inf, 0.0)

    def lookahead(self, state: Any) -> Any:
        return jnp.broadcast_to(
            jnp.where(state == 3, -jnp.inf, 0.0)[:, None], (state.shape[0], VOCAB_SIZE)
        )


def trapped() -> tuple[Target, dict[helpers.String, float]]:
    """A target with `Trap`, and gamma: strings without token 3."""
    truth = {x: p for x, p in gamma("hmm", "plain").items() if 3 not in x}
    return plain("hmm") * Trap(), truth


def test_a_prefix_without_continuation_keeps_its_place():
    target, truth = trapped()
    check_law(beam_masses(jax.random.key(9), target, 4), truth, resolution=0.03)


def test_all_dead_is_a_flag():
    target = plain("hmm") * ppl.banned([0, 2, 3]) * ppl.min_tokens(1)
    out = stochastic_beam.run(jax.random.key(10), target, num_samples=3)
    assert out.all_dead and out.log_z == -jnp.inf and (out.log_weights == -jnp.inf).all()
    assert int(out.num_invalid) == 0


def test_a_potential_that_is_nan_kills_and_is_counted():
    def score(tokens: Any, length: Any) -> Any:
        return jnp.where(tokens[:, 0] == 3, jnp.nan, 0.0)

    out = stochastic_beam.run(jax.random.key(11), plain("hmm") * ppl.reward(score), num_samples=125)
    bad = np.asarray(out.sequences.tokens[:, 0]) == 3
    present = np.asarray(out.log_q) > -np.inf
    assert (np.asarray(out.log_weights) == -np.inf)[bad | ~present].all()
    assert np.isfinite(np.asarray(out.log_weights)[~bad & present]).all()
    assert int(out.num_invalid) == (bad & present).sum() > 0
    truth = sum(p for x, p in gamma("hmm", "plain").items() if x[:1] != (3,))
    np.testing.assert_allclose(jnp.exp(out.log_z), truth, rtol=1e-4)


def test_a_model_whose_logits_are_nan_kills_and_is_counted():
    lm = MODELS["markov"]()
    broken = dataclasses.replace(
        lm, params=jax.tree.map(lambda leaf: leaf.at[3].set(jnp.nan), lm.params)
    )
    out = stochastic_beam.run(
        jax.random.key(12), broken.given(PROMPT, max_tokens=2), num_samples=20
    )
    weights = np.exp(np.asarray(out.log_weights + out.log_z, np.float64)) / 20
    law = helpers.brute_force_law(lm, PROMPT, 2)[0]
    assert np.isfinite(weights).all() and int(out.num_invalid) == 1
    np.testing.assert_allclose(
        weights.sum(), sum(p for x, p in law.items() if x[:1] != (3,)), rtol=1e-4
    )


# Numbers.


def test_keys_of_children_against_float64():
    """-log(e^-T - e^-Z + e^-G), with the greatest exactly the parent's, for prefixes of any
    probability.
    """
    for log_q in (0.0, -30.0, -700.0):
        check_children(log_q)


def check_children(log_q: float) -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, 300)) * 4
    logits[:, 7] = -np.inf
    target = dataclasses.replace(
        plain("hmm"), lm=dataclasses.replace(MODELS["hmm"](), vocab_size=300)
    )
    beam = stochastic_beam.init(jax.random.key(0), plain("hmm"), 2)
    score = jnp.asarray([log_q - 3, log_q + 0.5, log_q + 12], jnp.float32)
    beam = dataclasses.replace(
        beam,
        strings=dataclasses.replace(beam.strings, active=jnp.ones(3, bool)),
        score=score,
        log_q=jnp.full(3, log_q, jnp.float32),
    )
    keys = jax.random.split(jax.random.key(1), 3)
    found, found_log_q = stochastic_beam.children(
        keys, target, beam, jnp.asarray(logits, jnp.float32)
    )
    gumbel = [jax.random.gumbel(key, (300,), jnp.float32, mode="high") for key in keys]
    law = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    np.testing.assert_allclose(found_log_q, law, rtol=1e-4)
    free = (law + np.asarray(gumbel, np.float64)).astype(np.longdouble)
    t = (np.asarray(score, np.longdouble) - log_q)[:, None]
    with np.errstate(divide="ignore"):
        exact = log_q - np.log(np.exp(-t) - np.exp(-free.max(1, keepdims=True)) + np.exp(-free))
    np.testing.assert_allclose(found, exact.astype(np.float64), rtol=1e-4, atol=1e-3)
    np.testing.assert_array_equal(found.max(1), score)
    assert (found[:, 7] == -jnp.inf).all()


@pytest.mark.slow
def test_long_strings_of_tiny_probability():
    lm = tabular.markov(jnp.asarray([[0.4, 0.001, 0.3, 0.299]] * 4), eos=EOS)
    target = lm.given(PROMPT, max_tokens=200)
    out = stochastic_beam.run(jax.random.key(13), target, num_samples=6)
    x = out.sequences
    assert np.isfinite(out.log_weights).all() and float(out.log_q.min()) < -100
    np.testing.assert_allclose(out.log_q, target.log_density(x.tokens, x.length), rtol=1e-4)
    assert len({row for row in helpers.as_strings(x.tokens, x.length)}) == 6


# Planted faults.


def no_inclusion(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(stochastic_beam, "log_inclusion", lambda log_q, kappa: jnp.zeros_like(log_q))


def keys_not_conditioned(patch: pytest.MonkeyPatch) -> None:
    """Children's keys are fresh Gumbels, whatever their parent's was."""

    def children(keys: Any, target: Target, beam: Any, logits: Any) -> Any:
        law = jnp.where(beam.strings.active[:, None], jax.nn.log_softmax(logits), -jnp.inf)
        noise = jax.vmap(lambda key: jax.random.gumbel(key, law.shape[1:]))(keys)
        return beam.log_q[:, None] + law + noise, law

    patch.setattr(stochastic_beam, "children", children)


def cache_stays_behind(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(LM, "reorder", lambda self, cache, ancestors: cache)


def stuck_prefixes_vanish(patch: pytest.MonkeyPatch) -> None:
    best = stochastic_beam.best
    patch.setattr(
        stochastic_beam,
        "best",
        lambda beam, scores: best(
            dataclasses.replace(beam, score=jnp.where(beam.strings.active, -jnp.inf, beam.score)),
            scores,
        ),
    )


FAULTS = [no_inclusion, keys_not_conditioned, cache_stays_behind, stuck_prefixes_vanish]


@pytest.mark.slow
@pytest.mark.parametrize("plant", FAULTS)
def test_a_planted_fault_fails(plant: Any, monkeypatch: pytest.MonkeyPatch):
    target, truth = (
        trapped() if plant is stuck_prefixes_vanish else (plain("table"), gamma("table", "plain"))
    )
    plant(monkeypatch)
    # The beam's width is the fault's own, so that nothing compiled for another test is used, nor
    # this for another.
    width = 5 + FAULTS.index(plant)
    with pytest.raises(AssertionError, match="z = |z: "):
        check_law(beam_masses(jax.random.key(14), target, width), truth, resolution=0.1)


@pytest.mark.bad_input
@pytest.mark.parametrize("num", [0, -1, 2.5])
def test_num_samples_must_be_a_count(num: Any):
    with pytest.raises(
        ValueError, match=f"num_samples to be a whole number of at least 1, got {num}; pass e.g."
    ):
        stochastic_beam.run(jax.random.key(15), plain("hmm"), num_samples=num)
