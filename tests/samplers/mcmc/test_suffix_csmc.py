"""Conditional SMC from a cut leaves its target invariant: every random choice enumerated, and the
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
from ppl.rows import take_rows
from ppl.sequences import Sequences
from samplers import resampling
from samplers.diagnostics import normalise
from samplers.kernels import cycle
from samplers.mcmc import multiple_try, suffix, suffix_csmc
from samplers.strings import cuts, growing, proposals, regeneration
from samplers.testing import check_kernel
from tests.helpers import PROMPT, TraceCounter
from tests.samplers.chains import (
    Chain,
    chi_square_z,
    eight_strings,
    first_cut,
    pieces_of,
    second_eigenvalue,
    wordy,
)
from tests.samplers.mcmc.test_multiple_try import multiple_try_chain
from tests.samplers.problems import score_arrays, target_of
from tests.samplers.tape import small_target, three_letters


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


# The transition matrix.

Particle = tuple[int, float]
"""The first string that begins as the particle does, and its log-weight; which position comes next,
all share.
"""

ALWAYS = 1.1


@dataclasses.dataclass
class Sweeps:
    """All sweeps of `suffix_csmc.kernel` from one cut, position by position, from its own weights
    and decisions.

    Particles that draw are exchangeable, so populations are sorted and merged.
    """

    target: Any
    how: Any
    pieces: Any
    size: int
    pinned: int = -1

    def __post_init__(self) -> None:
        x = self.pieces
        self.tokens, self.length = np.asarray(x.sequences.tokens), np.asarray(x.sequences.length)
        num, self.horizon = self.tokens.shape
        positions = [jnp.full(num, t) for t in range(self.horizon)]
        self.increments = np.stack(
            [np.asarray(suffix_csmc.increment(self.target, x, t)) for t in positions], 1
        )
        self.draw = np.exp(np.asarray(x.log_q))
        self.first: dict[tuple, int] = {}
        for row in range(num):
            for t in range(self.horizon + 1):
                self.first.setdefault(tuple(self.tokens[row, :t]), row)
        self.decide = jax.jit(
            lambda w, active: suffix_csmc.degenerate(w, active, self.how.threshold)
        )
        self.shares = jax.jit(jax.vmap(normalise))

    def begins(self, row: int, t: int) -> int:
        return self.first[tuple(self.tokens[row, :t])]

    def active(self, particle: Particle, t: int) -> bool:
        """Whether it has a token at position t."""
        return (
            t < self.horizon
            and not np.isneginf(particle[1])
            and t <= self.length[self.begins(particle[0], t)]
            and (t == 0 or self.tokens[particle[0], t - 1] != self.target.lm.eos)
        )

    def children(self, particle: Particle, t: int) -> list[tuple[Particle, float]]:
        if not self.active(particle, t):
            return [(particle, 1.0)]
        row, log_weight = particle
        begin = tuple(self.tokens[row, :t])
        rows = [self.first[(*begin, v)] for v in range(self.target.lm.vocab_size)]
        return [
            ((i, log_weight + self.increments[i, t]), self.draw[i, t])
            for i in rows
            if self.draw[i, t] > 0
        ]

    def all(self, x: int, r: int) -> np.ndarray:
        """The law of the next string."""
        start = self.begins(x, r)
        states: dict[tuple, float] = {(((start, 0.0),) * (self.size - 1), (start, 0.0)): 1.0}
        for t in range(r, self.horizon):
            grown: dict[tuple, float] = {}
            for (free, own), prob in states.items():
                if self.active(own, t):
                    row = self.begins(x, t + 1)
                    own = (row, own[1] + self.increments[x, t])
                for drawn in itertools.product(*(self.children(particle, t) for particle in free)):
                    key = tuple(sorted(particle for particle, _ in drawn)), own
                    grown[key] = grown.get(key, 0.0) + prob * np.prod([q for _, q in drawn])
            states = self.resampled(grown, t + 1)
        return self.final(states, r)

    def resampled(self, states: dict[tuple, float], t: int) -> dict[tuple, float]:
        weights = np.asarray([[w for _, w in (*free, own)] for free, own in states])
        active = np.asarray([[self.active(p, t) for p in (*free, own)] for free, own in states])
        when, shares = self.padded(self.decide, weights, active), self.padded(self.shares, weights)
        found: dict[tuple, float] = {}
        for ((free, own), prob), resample, share in zip(states.items(), when, shares, strict=True):
            if not resample:
                found[free, own] = found.get((free, own), 0.0) + prob
                continue
            pool = [(row, 0.0) for row, _ in (*free, own)]
            for ancestors in itertools.product(range(self.size), repeat=self.size - 1):
                key = tuple(sorted(pool[a] for a in ancestors)), pool[self.pinned]
                found[key] = found.get(key, 0.0) + prob * share[list(ancestors)].prod()
        return found

    def padded(self, f: Callable[..., Any], *arrays: np.ndarray) -> np.ndarray:
        """f of rows, in few shapes."""
        num = len(arrays[0])
        size = 4 ** int(np.ceil(np.log(num) / np.log(4) + 1e-9))
        return np.asarray(f(*(jnp.asarray(np.resize(a, (size, a.shape[1]))) for a in arrays)))[:num]

    def final(self, states: dict[tuple, float], r: int) -> np.ndarray:
        rows = np.asarray([[row for row, _ in (*free, own)] for free, own in states])
        weights = np.asarray([[w for _, w in (*free, own)] for free, own in states])
        flat = jnp.asarray(self.length[rows].ravel())
        finals = suffix_csmc.final_log_weights(
            self.target, self.how, jnp.asarray(weights.ravel()), jnp.full_like(flat, r), flat
        )
        shares = np.exp(np.asarray(finals).reshape(weights.shape))
        shares /= shares.sum(1, keepdims=True)
        law = np.zeros(len(self.length))
        np.add.at(law, rows, np.asarray([*states.values()])[:, None] * shares)
        return law


def csmc_chain(
    target: Any, *, num_particles: int, threshold: float = 0.5, pinned: int = -1, **options: Any
) -> Chain:
    """K of `suffix_csmc.kernel`; `pinned` is the particle whose place the reference's slot takes,
    by right the last.
    """
    how = suffix_csmc.method(target, num_particles=num_particles, threshold=threshold, **options)
    with jax.enable_x64(True):
        x = pieces_of(target, how)
        sweeps = Sweeps(target, how, x, num_particles, pinned)
        log_gamma, length = np.asarray(regeneration.log_density(target, x)), x.sequences.length
        num, horizon = len(log_gamma), target.max_tokens
        matrix = np.zeros((num, num))
        for r in range(horizon):
            cut = jnp.full(num, r)
            chance = np.exp(np.asarray(how.cut(cut, length, jnp.full(num, horizon)), np.float64))
            moves = np.asarray(suffix_csmc.can_move(target, x, cut))
            for i in np.flatnonzero((chance > 0) & np.isfinite(log_gamma)):
                matrix[i] += chance[i] * (sweeps.all(i, r) if moves[i] else np.eye(num)[i])
    np.testing.assert_allclose(matrix.sum(1), np.isfinite(log_gamma), atol=1e-5)
    np.fill_diagonal(matrix, 0.0)
    return Chain(x, log_gamma - np.logaddexp.reduce(log_gamma), matrix + np.diag(1 - matrix.sum(1)))


SMALL: dict[str, Callable[[], Any]] = {
    "factors": lambda: small_target(3),
    "power": eight_strings,
    "reward": lambda: three_letters(3) ** 0.7 * ppl.reward(score_arrays),
    "must_end": lambda: three_letters(3) ** 1.5 * ppl.must_end(),
    "min_tokens": lambda: three_letters(3) ** 1.5 * ppl.min_tokens(2),
    "ends_meet": lambda: (
        three_letters(3) ** 1.3 * ppl.reward(lambda x, n: 1.5 * (x[:, 0] == x[:, 2]))
    ),
}
LENGTH, LOCAL = {"cut": cuts.uniform_in_length}, {"proposal": proposals.locally_optimal}
NARROW = {"proposal": proposals.top_k(2)}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("factors", {"num_particles": 2, "threshold": ALWAYS}),
        slow("factors", {"num_particles": 2, "threshold": 0.0}),
        slow("power", {"num_particles": 3, "threshold": ALWAYS, "temperature": 0.6}),
        slow("reward", {"num_particles": 2, "threshold": ALWAYS, **NARROW}),
        slow("must_end", {"num_particles": 2, "threshold": 0.7, **LOCAL, **LENGTH}),
        slow("min_tokens", {"num_particles": 3, "threshold": 0.7}),
        slow("ends_meet", {"num_particles": 2, "threshold": ALWAYS}),
    ],
)
def test_the_transition_matrix_leaves_pi_invariant(name: str, options: dict[str, Any]):
    """|pi K - pi| <= 1e-12 and detailed balance."""
    chain = csmc_chain(SMALL[name](), **options)
    assert chain.bias <= 1e-12 and chain.imbalance <= 1e-12 and chain.matrix.min() >= -1e-6
    assert 1 - chain.pi @ np.diag(chain.matrix) > 0.01


@pytest.mark.slow
def test_what_mixes_how_fast():
    """More particles and tries are better; on short strings multiple tries are better, and
    resampling does not pay.
    """
    target = eight_strings()
    tries = [
        second_eigenvalue(multiple_try_chain(target, num_tries=m, cut=first_cut)) for m in (1, 2)
    ]
    swept = {
        (n, threshold): second_eigenvalue(
            csmc_chain(target, num_particles=n, threshold=threshold, cut=first_cut)
        )
        for n, threshold in ((2, ALWAYS), (3, ALWAYS), (2, 0.0), (3, 0.0))
    }
    assert tries[0] < swept[2, 0.0] < swept[2, ALWAYS]
    assert tries[1] < swept[3, 0.0] < swept[3, ALWAYS]
    assert swept[3, ALWAYS] < swept[2, ALWAYS] - 0.02 and swept[3, 0.0] < swept[2, 0.0] - 0.02


def test_without_resampling_it_draws_by_weight_from_all():
    """N = 2: K = q(y) w(y) / (w(x) + w(y)), by hand."""
    target = eight_strings()
    chain = csmc_chain(target, num_particles=2, threshold=0.0, cut=first_cut)
    with jax.enable_x64(True):
        log_w = np.asarray(regeneration.increments(target, chain.pieces)).sum(1)
    inside = chain.pi > 0
    draw, w = np.exp(np.asarray(chain.pieces.log_q).sum(1))[inside], np.exp(log_w[inside])
    matrix = draw * w / (w[:, None] + w)
    np.fill_diagonal(matrix, 0.0)
    ours = chain.matrix[np.ix_(inside, inside)].copy()
    np.fill_diagonal(ours, 0.0)
    np.testing.assert_allclose(ours, matrix, atol=1e-12)


def without_q(target: Any, y: Any, position: Any) -> Any:
    """log q is forgotten."""
    return INCREMENT(target, dataclasses.replace(y, log_q=jnp.zeros_like(y.log_q)), position)


INCREMENT = suffix_csmc.increment
FAULTS: dict[str, tuple[str, Callable[..., Any]]] = {
    "log q forgotten": ("increment", without_q),
    "no law of the cut": ("final_log_weights", lambda target, how, log_weights, *rest: log_weights),
}


@pytest.mark.parametrize(
    "name", ["wrong slot pinned", "log q forgotten", *map(slow, list(FAULTS)[1:])]
)
def test_a_fault_is_not_invariant(name: str, monkeypatch: pytest.MonkeyPatch):
    if name in FAULTS:
        monkeypatch.setattr(suffix_csmc, *FAULTS[name])
    pinned = 0 if name == "wrong slot pinned" else -1
    chain = csmc_chain(small_target(3), num_particles=2, threshold=ALWAYS, pinned=pinned, **LENGTH)
    assert chain.bias > 1e-3


def test_resampling_has_the_position_that_strings_have_come_to(monkeypatch: pytest.MonkeyPatch):
    """One behind the other whatever has ended: keys are made of them."""
    seen: list[tuple[np.ndarray, np.ndarray]] = []

    def noted(keys: Any, rows: Any, how: Any, c: Any, position: Any) -> Any:
        jax.debug.callback(lambda *x: seen.append(x), position, c.growth.sequences.length)
        return c

    monkeypatch.setattr(suffix_csmc, "_resample", noted)
    target = three_letters(4)
    kernel = suffix_csmc.kernel(target, num_particles=4, cut=lambda *args: first_cut(*args))
    x = regeneration.no_strings(target, proposals.Powered(), 6)
    jax.block_until_ready(kernel.step(jax.random.key(0), x))
    jax.effects_barrier()
    position, length = map(np.array, zip(*seen, strict=True))
    longest, shortest = (of(length[-1].reshape(6, 4), axis=1) for of in (np.max, np.min))
    expected = np.minimum(np.arange(len(seen))[:, None], longest)
    assert (shortest + 1 < longest).any()
    np.testing.assert_array_equal(position, expected)


def test_a_chain_stays_where_nothing_would_lead_back():
    """The proposal cannot draw the second token: a string of the support moves from cuts behind it,
    one outside from any; neither beyond its end.
    """
    log_q, log_phi = jnp.zeros((2, 4)).at[:, 1].set(-jnp.inf), jnp.zeros((2, 4))
    strings = Sequences(jnp.zeros((2, 4), jnp.int32), jnp.full(2, 2, jnp.int32))
    x = regeneration.State(strings, log_phi, log_q, log_phi.at[1, 1].set(-jnp.inf), cache=None)
    found = [suffix_csmc.can_move(three_letters(4), x, jnp.full(2, cut)) for cut in range(4)]
    expected = [[False, True], [False, True], [True, True], [False, False]]
    np.testing.assert_array_equal(found, expected)


# The jitted chains.


@pytest.mark.slow
def test_the_chains_make_the_moves_of_the_matrix():
    target = SMALL["factors"]()
    options: dict[str, Any] = {"num_particles": 3, "threshold": 0.8, **LENGTH}
    counts = check_kernel(suffix_csmc.kernel(target, **options), target, key=jax.random.key(3))
    chain = csmc_chain(target, **options)
    assert chain.bias <= 1e-12 and chain.imbalance <= 1e-12
    assert abs(chi_square_z(counts, chain.matrix)) < 5
    # The test would see another kernel.
    other = csmc_chain(target, **{**options, "num_particles": 5 - options["num_particles"]})
    assert chi_square_z(counts, other.matrix) > 10


@pytest.mark.slow
def test_longer_strings():
    """A power of two models and a constraint."""
    target = target_of("table", "power_of_all")
    kernel = suffix_csmc.kernel(target, num_particles=3, threshold=0.9)
    check_kernel(kernel, target, key=jax.random.key(2), num_steps=2)


def stale(target: Any, proposal: Any, g: Any, rows: Any) -> Any:
    """The potential's states stay in their slots."""
    right = growing.reorder(target, proposal, g, rows)
    here = jnp.arange(len(rows)) if len(g.active) == len(rows) else rows
    return dataclasses.replace(right, potential=take_rows(g.potential, here))


JITTED_FAULTS: dict[str, tuple[str, Callable[..., Any]]] = {
    "nothing is pinned": ("pinned_multinomial", resampling.multinomial),
    "state of the potential": ("reorder", stale),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", JITTED_FAULTS)
def test_chains_with_a_fault_are_found_out(name: str, monkeypatch: pytest.MonkeyPatch):
    target, cut = (
        SMALL["ends_meet"](),
        lambda *args: first_cut(*args),
    )  # a new function: traced anew
    monkeypatch.setattr(suffix_csmc, *JITTED_FAULTS[name])
    kernel = suffix_csmc.kernel(target, num_particles=2, threshold=ALWAYS, cut=cut)
    with pytest.raises(AssertionError, match="not invariant"):
        check_kernel(kernel, target, key=jax.random.key(3), num_steps=3)


@pytest.mark.slow
def test_in_turn_with_others():
    """Suffix moves, token replacement and particle Gibbs share a state."""
    target = target_of("table", "every_1")
    parts = (
        suffix.kernel(target),
        multiple_try.token_replacement(target),
        suffix_csmc.kernel(target, num_particles=3),
    )
    check_kernel(cycle(*parts), target, key=jax.random.key(4), num_steps=2)


# What else is promised.

LARGE = wordy()


@pytest.fixture(scope="module")
def large() -> tuple[Any, Sequences]:
    """p over 50 tokens, T = 20, and 12 draws."""
    p = LARGE.given(PROMPT, max_tokens=20)
    return p, ancestral(jax.random.key(1), p, 12)


@pytest.mark.slow
def test_state_and_info_say_what_happened(large: Any):
    p, x = large
    target = p**2 * ppl.step_scores(score_arrays, ppl.Steps(every=1))
    kernel = suffix_csmc.kernel(target, num_particles=5, threshold=0.9)
    state, some = kernel.init(x), 0
    for i in range(3):
        before = state
        state, info = kernel.step(jax.random.key(i), state)
        old, new = np.asarray(before.sequences.tokens), np.asarray(state.sequences.tokens)
        cut, changed = np.asarray(info.details["cut"]), np.asarray(info.changed)
        np.testing.assert_array_equal((old != new).any(1), changed)
        assert (old == new)[np.arange(20) < cut[:, None]].all()
        beyond = cut > np.asarray(before.sequences.length)
        np.testing.assert_array_equal(info.proposed, ~beyond)
        np.testing.assert_array_equal(info.accepted, ~beyond)
        assert not changed[beyond].any() and not np.asarray(info.tokens)[beyond].any()
        assert (np.asarray(info.tokens) >= 4)[~beyond].all() and int(info.cost.tokens) == int(
            info.tokens.sum()
        )
        assert (
            int(info.cost.potential_calls) > int(info.cost.tokens) and int(info.cost.forwards) <= 20
        )
        assert (np.asarray(info.details["resampled"]) > 0).any() and not np.asarray(
            info.details["resampled"]
        )[beyond].any()
        assert (
            not info.outside_support.any()
            and not info.invalid.any()
            and not info.missing_support.any()
        )
        some += changed.sum()
    assert some > 5
    fresh = kernel.init(state.sequences)
    for name in ("log_p", "log_q", "log_phi"):
        np.testing.assert_allclose(getattr(state, name), getattr(fresh, name), atol=1e-4)
    # The cache too is that of the string.
    steps = [
        target.lm.step(target.prefix, y.cache, y.sequences.tokens[:, 0])[1] for y in (state, fresh)
    ]
    np.testing.assert_allclose(steps[0], steps[1], atol=1e-4)


@pytest.mark.slow
def test_chains_of_their_own_alpha(large: Any):
    """Each moves as it does where all have its alpha; nor does it matter how many there are."""
    p, x = large
    alphas, key = jnp.linspace(1.0, 4.0, 12), jax.random.key(7)

    def moved(target: Any, x: Sequences) -> Any:
        kernel = suffix_csmc.kernel(target, num_particles=3, threshold=0.9)
        state, info = kernel.step(key, kernel.init(x))
        return state.sequences.tokens, info.details["resampled"]

    tokens, resampled = moved(dataclasses.replace(p, alpha=alphas), x)
    assert int(resampled.sum()) > 12
    for i in (5, 11):
        alone, times = moved(p ** float(alphas[i]), take_rows(x, jnp.arange(i + 1)))
        np.testing.assert_array_equal(tokens[i], alone[i])
        assert int(resampled[i]) == int(times[i])


@pytest.mark.slow
def test_the_threshold_and_the_reference_alone(large: Any):
    p, x = large
    for options, least in (
        ({"threshold": 0.0}, 0),
        ({"num_particles": 1, "threshold": 0.5}, 0),
        ({}, 1),
    ):
        kernel = suffix_csmc.kernel(p**4, **options)
        state, info = kernel.step(jax.random.key(0), kernel.init(x))
        assert (int(info.details["resampled"].sum()) > 0) == bool(least)
        if options.get("num_particles") == 1:
            np.testing.assert_array_equal(state.sequences.tokens, x.tokens)
            assert not info.tokens.any() and not info.changed.any()


@pytest.mark.slow
def test_a_chain_outside_of_the_support_comes_in():
    target = target_of("hmm", "banned")
    x = Sequences(jnp.tile(jnp.asarray([[0, 2, 3, 3]]), (200, 1)), jnp.full(200, 4))
    state = regeneration.score(target, proposals.Powered(), x)
    kernel = suffix_csmc.kernel(target, num_particles=3)
    for i in range(8):
        state, info = kernel.step(jax.random.key(i), state)
        outside = np.isneginf(
            np.asarray(target.log_density(state.sequences.tokens, state.sequences.length))
        )
        np.testing.assert_array_equal(info.outside_support, outside)
    assert outside.mean() < 0.2


@pytest.mark.slow
def test_a_new_kernel_compiles_nothing_new(large: Any):
    p, x = large
    counter, seen = TraceCounter(cuts.uniform), []
    for alpha, key in itertools.product((2.0, 3.0), (0, 1)):
        kernel = suffix_csmc.kernel(p**alpha, cut=counter, threshold=0.2 * alpha)
        kernel.step(jax.random.key(key), kernel.init(x))
        seen.append(counter.count)
    assert seen[0] == seen[-1] > 0


@pytest.mark.bad_input
def test_bad_input():
    p, x = three_letters(2), Sequences(jnp.asarray([[0, 2], [2, 2]]), jnp.asarray([2, 2]))
    with pytest.raises(
        ValueError, match="expected num_particles to be a whole number of at least 1, got 0"
    ):
        suffix_csmc.kernel(p, num_particles=0)
    with pytest.raises(ValueError, match="expected a target with alpha above 0"):
        suffix_csmc.kernel(p**-1.0)
    with pytest.raises(
        ValueError, match="in the support of the target, got log gamma = -inf for row"
    ):
        suffix_csmc.kernel(p * ppl.banned([0])).init(x)
