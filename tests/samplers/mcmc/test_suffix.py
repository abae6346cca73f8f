"""Suffix Metropolis-Hastings leaves its target invariant: transition matrices enumerated, and the
jitted chains.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ppl
from ppl.ancestral import ancestral
from ppl.exact import enumerate_strings
from ppl.potential import Potential
from ppl.pytrees import register_dataclass
from ppl.rows import take_rows
from ppl.sequences import Sequences
from samplers.base import Kernel
from samplers.mcmc import suffix
from samplers.strings import awrs, cuts, proposals, regeneration
from samplers.testing import check_kernel
from tests.helpers import EOS, MAX_TOKENS, PROMPT, TraceCounter, hmm, law_of, total_variation
from tests.samplers.chains import chi_square_z, proposal_mass, published_bias, suffix_chain, wordy
from tests.samplers.problems import gamma, plain, score_arrays, target_of

OPTIONS: dict[str, dict[str, Any]] = {
    "powered": {},
    "length": {"cut": cuts.uniform_in_length},
    "tempered": {"temperature": 0.7},
    "both": {"temperature": 1.2, "cut": cuts.uniform_in_length},
    "local": {"proposal": proposals.locally_optimal},
    "truncated": {
        "proposal": proposals.mixture([0.7, 0.3], [proposals.top_k(2), proposals.bootstrap])
    },
}
GUIDE: dict[str, Any] = {
    "proposal": proposals.LanguageModel(hmm().given((3, 0, 2), max_tokens=MAX_TOKENS) ** 0.7)
}


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


# The transition matrix.


@pytest.mark.parametrize(
    ("model", "problem", "ways"),
    [
        ("table", "power", ["powered", "length", "tempered"]),
        slow("markov", "reward", ["powered", "both", "local"]),
        slow("table", "banned", ["length", "tempered", "truncated"]),
        slow("table", "every_2", ["tempered", "local", "truncated"]),
        slow("hmm", "product", OPTIONS),
        slow("markov", "second_lm", ["powered", "both", "truncated"]),
    ],
)
def test_the_transition_matrix_leaves_pi_invariant(model: str, problem: str, ways: Any):
    """|pi K - pi| <= 1e-12 and detailed balance; pi is gamma, and q a law, by other means."""
    target = target_of(model, problem)
    for way in ways:
        chain = suffix_chain(target, **OPTIONS[way])
        assert chain.bias <= 1e-12 and chain.imbalance <= 1e-12
        assert chain.matrix.min() >= -1e-6
        moved = 1 - chain.pi @ np.diag(chain.matrix)
        assert moved > 0.01
        assert (
            max(
                np.abs(proposal_mass(chain.pieces, r) - 1)[chain.pi > 0].max()
                for r in range(MAX_TOKENS)
            )
            < 1e-5
        )
        x = chain.pieces.sequences
        truth = gamma(model, problem)
        total = sum(truth.values())
        law = law_of(x.tokens, x.length, chain.log_pi)
        assert (
            total_variation(law, {string: value / total for string, value in truth.items()}) < 1e-5
        )


def test_the_published_algorithm_is_not_invariant():
    assert published_bias(plain("table") ** 3) > 0.05


def shifted(target: Any, cut_law: Any, x: Any, y: Any, cut: Any, horizon: Any) -> Any:
    """The first token drawn is forgotten."""
    return RIGHT(target, lambda cut, *_: jnp.zeros(cut.shape), x, y, cut + 1, horizon)


def without_hastings(target: Any, cut_law: Any, *args: Any) -> Any:
    return RIGHT(target, cuts.uniform, *args)


def of_a_prefix(target: Any, cut_law: Any, x: Any, y: Any, cut: Any, horizon: Any) -> Any:
    """As much of the present string counts as the new one is long."""
    kept = jnp.arange(x.log_p.shape[1]) <= y.sequences.length[:, None]
    zero = {name: jnp.where(kept, getattr(x, name), 0.0) for name in ("log_p", "log_q", "log_phi")}
    return RIGHT(target, cut_law, dataclasses.replace(x, **zero), y, cut, horizon)


RIGHT = suffix.log_ratio
FAULTS: dict[str, tuple[str, Callable[..., Any], dict[str, Any]]] = {
    "no Hastings factor": ("log_ratio", without_hastings, OPTIONS["length"]),
    "log q forgotten": (
        "increments",
        lambda target, x: target.log_prob_factor(x.log_p) + x.log_phi,
        {},
    ),
    "alpha forgotten": ("increments", lambda target, x: x.log_p - x.log_q + x.log_phi, {}),
    "potential forgotten": (
        "increments",
        lambda target, x: target.log_prob_factor(x.log_p) - x.log_q,
        {},
    ),
    "one token late": ("log_ratio", shifted, {}),
    "of a prefix": ("log_ratio", of_a_prefix, {}),
    "the other way round": ("log_ratio", lambda t, c, x, y, *rest: RIGHT(t, c, y, x, *rest), {}),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_not_invariant(name: str, monkeypatch: pytest.MonkeyPatch):
    attribute, wrong, options = FAULTS[name]
    target = target_of("table", "power") * ppl.reward(score_arrays)
    monkeypatch.setattr(suffix, attribute, wrong)
    assert suffix_chain(target, **options).bias > 1e-3


# The jitted chains.


@pytest.mark.parametrize(
    ("model", "problem", "way"),
    [
        ("table", "reward", "length"),
        slow("table", "every_2", "tempered"),
        slow("markov", "product", "local"),
        slow("table", "banned", "both"),
    ],
)
def test_the_chains_make_the_moves_of_the_matrix(model: str, problem: str, way: str):
    target, options = target_of(model, problem), OPTIONS[way]
    matrix = suffix_chain(target, **options).matrix
    counts = check_kernel(suffix.kernel(target, **options), target, key=jax.random.key(3))
    assert abs(chi_square_z(counts, matrix)) < 5
    # The test would see another kernel.
    assert chi_square_z(counts, suffix_chain(target, temperature=0.4).matrix) > 10


def test_several_moves_are_those_of_the_matrix():
    """Of chains that do not wait for each other."""
    target, options = target_of("table", "reward"), OPTIONS["length"]
    how, plan = suffix.method(target, **options), cuts.whole(target, 3)
    kernel = Kernel(
        suffix.kernel(target, **options).init,
        lambda key, x: suffix.moves(key, target, how, x, plan),
    )
    counts = check_kernel(kernel, target, key=jax.random.key(4))
    matrix = suffix_chain(target, **options).matrix
    assert abs(chi_square_z(counts, np.linalg.matrix_power(matrix, 3))) < 5


@pytest.mark.slow
def test_another_language_model_proposes():
    target = target_of("table", "every_1")
    counts = check_kernel(
        suffix.kernel(target, **GUIDE), target, key=jax.random.key(3), num_steps=1
    )
    chain = suffix_chain(target, **GUIDE)
    assert chain.bias <= 1e-12 and abs(chi_square_z(counts, chain.matrix)) < 5


def no_replay(target: Any, proposal: Any, y: Any, active: Any) -> Any:
    """The potential is not told of the prefix."""
    nothing = Sequences(y.sequences.tokens, jnp.zeros_like(y.sequences.length))
    fresh = regeneration.start(target, proposal, dataclasses.replace(y, sequences=nothing), active)
    return dataclasses.replace(fresh, sequences=y.sequences)


def new_cache_is_kept(caches: Any, accepted: Any, rows: Any) -> Any:
    """After a rejection the cache is that of the string rejected."""
    return SETTLED(caches, jnp.ones_like(accepted), rows)


JITTED_FAULTS: dict[str, tuple[str, Callable[..., Any]]] = {
    "cache not restored": ("settled", new_cache_is_kept),
    "potential not replayed": ("start", no_replay),
}
SETTLED = suffix.settled


@pytest.mark.slow
@pytest.mark.parametrize("name", JITTED_FAULTS)
def test_chains_with_a_fault_are_found_out(name: str, monkeypatch: pytest.MonkeyPatch):
    target = plain("table") ** 1.3 * ppl.step_scores(score_arrays, ppl.Steps(every=1))
    cut = lambda *args: cuts.uniform_in_length(*args)  # noqa: E731, a new function: traced anew
    monkeypatch.setattr(suffix, *JITTED_FAULTS[name])
    with pytest.raises(AssertionError, match=r"not invariant|probability 0"):
        check_kernel(
            suffix.kernel(target, cut=cut),
            target,
            key=jax.random.key(3),
            num_chains=50_000,
            num_steps=4,
        )


# Early rejection.

LARGE = wordy()


@pytest.fixture(scope="module")
def large() -> tuple[Any, Sequences]:
    """p over 50 tokens, T = 30, and 24 draws."""
    p = LARGE.given(PROMPT, max_tokens=30)
    return p, ancestral(jax.random.key(1), p, 24)


@pytest.mark.parametrize(
    ("build", "options"),
    [
        (lambda p: p**4, {}),
        slow(lambda p: p**3, {"temperature": 0.5, "cut": cuts.uniform_in_length}),
        slow(lambda p: p**3 * ppl.banned([7]), {"temperature": 1 / 3, "log_phi_max": 0.0}),
        slow(lambda p: p**2 * ppl.reward(lambda x, n: -0.3 * n), {"log_phi_max": 0.0}),
        slow(lambda p: p**2 * ppl.banned([7]), {"temperature": 1.1}),
    ],
)
def test_early_rejection_changes_the_cost_and_nothing_else(large: Any, build: Any, options: Any):
    p, x = large
    target = build(p)
    x = Sequences(jnp.where(x.tokens == 7, 8, x.tokens), x.length)
    key = jax.random.key(2)

    def run(early: bool) -> tuple[Any, Any]:
        how = suffix.method(target, early_rejection=early, **options)
        return suffix.moves(
            key, target, how, regeneration.score(target, how.proposal, x), cuts.whole(target, 8)
        )

    (found, info), (plain, full) = run(True), run(False)
    np.testing.assert_array_equal(found.sequences.tokens, plain.sequences.tokens)
    np.testing.assert_array_equal(found.sequences.length, plain.sequences.length)
    np.testing.assert_array_equal(found.log_p, plain.log_p)
    np.testing.assert_array_equal(info.accepted, full.accepted)
    np.testing.assert_array_equal(info.details["cut"], full.details["cut"])
    early = np.asarray(info.details["rejected_early"])
    assert early.sum() > 10 and not full.details["rejected_early"].any()
    assert info.cost.tokens < 0.95 * full.cost.tokens and info.cost.forwards <= full.cost.forwards
    assert not (early & np.asarray(info.accepted)).any()
    assert (np.asarray(info.log_ratio) >= np.asarray(full.log_ratio) - 1e-3)[early].all()
    np.testing.assert_array_equal(np.asarray(info.tokens)[~early], np.asarray(full.tokens)[~early])


@register_dataclass
@dataclasses.dataclass(frozen=True)
class FirstOfSome(Potential):
    """e^2 for the first token below 6, once; known in advance.  State: whether there was
    one [N].
    """

    def init(self, num: int) -> Any:
        return jnp.zeros(num, bool)

    def step(self, state: Any, token: Any) -> tuple[Any, Any]:
        return state | (token < 6), jnp.where((token < 6) & ~state, 2.0, 0.0)

    def final(self, state: Any) -> Any:
        return jnp.zeros(state.shape, jnp.float32)

    def lookahead(self, state: Any) -> Any:
        tokens = jnp.arange(50)
        return jnp.where((tokens < 6) & (tokens != EOS) & ~state[:, None], 2.0, 0.0)


@pytest.mark.slow
def test_a_look_ahead_leaves_nothing_to_bound(large: Any):
    """Whoever passes the token by has, at every step, weight to gain: more in all than log Phi can
    be.
    """
    p, x = large
    target, key = p**1.0 * FirstOfSome(), jax.random.key(2)
    how = suffix.method(target, log_phi_max=2.0)
    state = regeneration.score(target, how.proposal, take_rows(x, jnp.arange(600) % 24))

    def run(early: bool) -> Any:
        chosen = dataclasses.replace(how, early_rejection=early)
        return suffix.moves(key, target, chosen, state, cuts.whole(target, 8))[1].accepted

    np.testing.assert_array_equal(run(True), run(False))


# What else is promised.


@pytest.mark.slow
def test_chains_do_not_depend_on_how_many_run_together(large: Any):
    p, x = large
    target, key = p**2, jax.random.key(5)
    how = suffix.method(target)

    def run(num: int, num_moves: int) -> Any:
        some = regeneration.score(target, how.proposal, take_rows(x, jnp.arange(num)))
        return suffix.moves(key, target, how, some, cuts.whole(target, num_moves))

    (many, info), (few, less), (_, short) = run(24, 5), run(3, 5), run(24, 2)
    np.testing.assert_array_equal(many.sequences.tokens[:3], few.sequences.tokens)
    np.testing.assert_array_equal(info.details["cut"][:3], less.details["cut"])
    np.testing.assert_array_equal(info.accepted[:3], less.accepted)
    # Nor do the first moves depend on how many are to come.
    np.testing.assert_array_equal(info.details["cut"][:, :2], short.details["cut"])
    np.testing.assert_array_equal(info.accepted[:, :2], short.accepted)


def test_state_and_info_say_what_happened(large: Any):
    p, x = large
    target = p**4
    kernel = suffix.kernel(target)
    state = kernel.init(x)
    np.testing.assert_array_equal(state.sequences.tokens, x.tokens)
    for i in range(4):
        before = state
        state, info = kernel.step(jax.random.key(i), state)
        same = (np.asarray(state.sequences.tokens) == np.asarray(before.sequences.tokens)).all(1)
        assert same[~np.asarray(info.accepted)].all()
        cut = np.asarray(info.details["cut"])
        beyond = cut > np.asarray(before.sequences.length)
        np.testing.assert_array_equal(info.proposed, ~beyond)
        np.testing.assert_array_equal(info.changed, ~same)
        assert (np.asarray(info.tokens) == 0)[beyond].all() and (np.asarray(info.tokens) > 0)[
            ~beyond
        ].all()
        assert (
            not np.asarray(info.accepted)[beyond].any()
            and (np.asarray(info.log_ratio) == 0)[beyond].all()
        )
        kept = np.arange(30) < cut[:, None]
        assert (np.asarray(state.sequences.tokens) == np.asarray(before.sequences.tokens))[
            kept
        ].all()
        assert (
            int(info.cost.tokens) == int(info.tokens.sum()) and int(info.cost.potential_calls) == 0
        )
        assert int(info.cost.forwards) == int(info.tokens.max())
        assert info.accepted.shape == cut.shape == (24,)
        assert (
            not info.outside_support.any()
            and not info.invalid.any()
            and not info.missing_support.any()
        )
    # The pieces are kept up to date: they are those of a fresh look.
    fresh = kernel.init(state.sequences)
    np.testing.assert_allclose(state.log_p, fresh.log_p, atol=1e-5)
    np.testing.assert_allclose(state.log_q, fresh.log_q, atol=1e-5)
    density = target.log_density(state.sequences.tokens, state.sequences.length)
    np.testing.assert_allclose(regeneration.log_density(target, state), density, rtol=1e-5)


@pytest.mark.slow
def test_chains_do_not_wait_for_each_other(large: Any):
    """Eight chains' thirty moves take hardly more passes than the busiest chain alone has tokens to
    draw.
    """
    p, x = large
    how = suffix.method(p**2)
    some = regeneration.score(p**2, how.proposal, take_rows(x, jnp.arange(8)))
    _, info = suffix.moves(jax.random.key(0), p**2, how, some, cuts.whole(p, 30))
    assert int(info.cost.forwards) == int(info.tokens.sum(1).max())


@pytest.mark.slow
def test_a_chain_outside_of_the_support_comes_in():
    target = target_of("hmm", "banned")
    x = take_rows(
        Sequences(jnp.asarray([[0, 2, 3, 3]]), jnp.asarray([4])), jnp.zeros(200, jnp.int32)
    )
    how = suffix.method(target)
    state = regeneration.score(target, how.proposal, x)
    for i in range(12):
        state, info = suffix.moves(jax.random.key(i), target, how, state, cuts.whole(target, 1))
        outside = np.isneginf(
            np.asarray(target.log_density(state.sequences.tokens, state.sequences.length))
        )
        np.testing.assert_array_equal(info.outside_support[:, 0], outside)
    assert not outside.all() and outside.mean() < 0.2


@pytest.mark.slow
def test_what_the_proposal_cannot_draw_is_reported():
    target = target_of("table", "power")
    exact = enumerate_strings(target)
    x = take_rows(exact.sequences, jnp.asarray(np.flatnonzero(exact.probs > 0)))
    kernel = suffix.kernel(target, proposal=proposals.top_k(1))
    state, info = kernel.step(jax.random.key(0), kernel.init(x))
    drew = np.asarray(info.tokens) > 0
    assert (np.asarray(info.missing_support)[drew] > 0).any() and not np.asarray(
        info.missing_support
    )[~drew].any()
    # What cannot be drawn cannot be left for what can: the chain is invariant, though it does not
    # reach everything.
    chain = suffix_chain(target, proposal=proposals.top_k(1))
    assert chain.bias <= 1e-12
    _, info = suffix.kernel(target).step(jax.random.key(0), state)
    assert not info.missing_support.any()


@pytest.mark.slow
def test_a_new_kernel_compiles_nothing_new(large: Any):
    p, x = large
    counter = TraceCounter(cuts.uniform)
    seen = []
    for alpha, key in itertools.product((2.0, 3.0), (0, 1)):
        kernel = suffix.kernel(p**alpha, cut=counter)
        kernel.step(jax.random.key(key), kernel.init(x))
        seen.append(counter.count)
    assert seen[0] == seen[-1] > 0


@pytest.mark.bad_input
def test_bad_input(large: Any):
    p, x = large
    for alpha in (0.0, -1.0):
        with pytest.raises(ValueError, match="expected a target with alpha above 0"):
            suffix.kernel(p**alpha)
    with pytest.raises(ValueError, match="expected a target with alpha above 0, got nan"):
        suffix.kernel(dataclasses.replace(p, alpha=jnp.float32(jnp.nan)))
    with pytest.raises(ValueError, match="expected a temperature above 0"):
        suffix.kernel(p, temperature=0.0)
    with pytest.raises(ValueError, match="got both"):
        suffix.kernel(p, temperature=1.0, proposal=proposals.bootstrap)
    with pytest.raises(ValueError, match="expected a proposal with a law"):
        suffix.kernel(p, proposal=awrs.AWRS())
    with pytest.raises(ValueError, match=r"expected strings with tokens \[C, 30\]"):
        suffix.kernel(p).init(Sequences(x.tokens[:, :3], x.length))
    banned = int(x.tokens[5, 0])
    with pytest.raises(
        ValueError, match="in the support of the target, got log gamma = -inf for row"
    ):
        suffix.kernel(p * ppl.banned([banned])).init(x)
