"""Adaptive weighted rejection sampling (arXiv 2504.05410): tokens under a yes/no constraint that is
dear to evaluate.

Tokens v ~ p are drawn and tested until one passes; what was rejected is not drawn again.  Masking
would have to test all V tokens; here about 1 / sum_v p(v) ok(v) tests (and one or more for the
weight) do.  With p unnormalised, the token and its weight w are properly weighted for the
constrained law:

    E[ w 1{token = v} ] = p(v) ok(v)        hence  E[w] = sum_v p(v) ok(v)

at any limit on the number of tests.  R below is the mass that has not been rejected, summed from
what is left and never as 1 - rejected, so that float32 is enough when nearly all mass is rejected.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from ppl.checks import check_count
from ppl.draw import uniforms
from ppl.potential import Potential, Product, State
from ppl.pytrees import as_pytree, register_dataclass
from ppl.rows import at
from ppl.showing import shown
from ppl.target import Target

from .laws import Draw, Proposal
from .proposals import Stateless, locally_optimal
from .removal import Rest, everything, pick, remove

_OPTIMAL = Stateless(as_pytree(locally_optimal))

MANY = 15.0
"""Log of a count from which on float32 holds it as a log; below, as an integer."""

Accepts = Callable[[Int[Array, " N"], Bool[Array, " N"]], Any]
"""(token[N], needed[N]) -> ok[N], or (ok[N], invalid[N]) where a test may find what is no number:
tests one candidate per row; rows that are not needed may hold anything.
"""


@shown
class Weighted(NamedTuple):
    """A token per row [N], its log-weight [N] (-inf: none passed, and the token is 0), the tests
    it took [N], and whether one of these was invalid [N].
    """

    token: Int[Array, " N"]
    log_weight: Float[Array, " N"]
    tests: Int[Array, " N"]
    invalid: Bool[Array, " N"]


def recursive(
    keys: Key[Array, " N"],
    log_probs: Float[Array, "N V"],
    accepts: Accepts,
    *,
    max_rejects: int | None = None,
) -> Weighted:
    """The recursive form: the first token v that passes, weighed by a test of the next one, u.

        w = R        if u passes, v was the last token, or there is no test left
        w = p(v)     if u fails

    where R includes v.  Before v passes, each rejected token shows that p(token) ok(token) = 0, and
    the problem that is left is the same over the mass that is left; w averages p(v) + (R - p(v))
    ok(u) over u, so it is proper for R.

    Args:
        keys: one typed key per row, so that row i does not depend on N.
        log_probs: log p [N, V], unnormalised; -inf is never drawn.
        accepts: the test; called with one candidate per row until all rows are done.
        max_rejects: the greatest number of tests of a row; None tests until a token passes.

    Raises:
        ValueError: if `max_rejects` < 1.
    """
    return _search(keys, log_probs, accepts, jnp.ones(log_probs.shape[0], bool), 2, max_rejects)


def geometric(
    keys: Key[Array, " N"],
    log_probs: Float[Array, "N V"],
    accepts: Accepts,
    *,
    max_accepts: int = 2,
    max_rejects: int | None = None,
) -> Weighted:
    """The geometric form: rejection sampling with replacement until `max_accepts` tokens pass; the
    first one is kept.

        w = sum_v p(v) * min(max_accepts - 1, A) / (A + F - 1)        A passed, F failed; 0 if A = 0

    which is the unbiased estimate of a success probability under inverse sampling.  Draws with
    replacement that hit a rejected token are not made but counted: before each draw, F grows by a
    geometric number with success probability R / sum_v p(v).  A token that has passed is not tested
    again.  More accepts: more tests, less variance.

    Args:
        keys, log_probs, accepts: as in `recursive`.
        max_accepts: how many tokens are to pass.
        max_rejects: stop at F = max_rejects, uncounted draws included; None never.

    Raises:
        ValueError: if `max_accepts` < 2 or `max_rejects` < 1.
    """
    return _search(
        keys, log_probs, accepts, jnp.zeros(log_probs.shape[0], bool), max_accepts, max_rejects
    )


def adaptive(
    keys: Key[Array, " N"],
    log_probs: Float[Array, "N V"],
    accepts: Accepts,
    *,
    max_accepts: int = 2,
    max_rejects: int | None = None,
) -> Weighted:
    """The paper's choice, row by row: geometric if max_v p(v) >= 2/3 of the mass or max_accepts >
    2, else recursive.

    The choice looks at p alone, never at a test, so the weights stay proper.  Arguments and errors
    as in `geometric`.
    """
    peaked = jnp.max(log_probs, axis=1) >= jax.nn.logsumexp(log_probs, axis=1) + jnp.log(2 / 3)
    return _search(keys, log_probs, accepts, ~peaked & (max_accepts == 2), max_accepts, max_rejects)


def _log_phantoms(keys: Key[Array, " N"], log_success: Float[Array, " N"]) -> Float[Array, " N"]:
    """Log of how many draws with replacement hit a rejected token before one does not: geometric,
    by inversion.

    In logs because the number exceeds float32 where a peaked p (a power of one) is rejected.
    """
    u = uniforms(keys)
    # log(-log(1 - s)) is log s up to s / 2.
    log_rate = jnp.where(
        log_success < -15, log_success, jnp.log(-jnp.log1p(-jnp.exp(jnp.minimum(log_success, 0))))
    )
    log_count = jnp.log(-jnp.log1p(-u)) - log_rate
    return jnp.where(log_count < MANY, jnp.log(jnp.floor(jnp.exp(log_count))), log_count)


class _Found(NamedTuple):
    """What the rows know after a number of rounds: the first token that passed and its recursive
    log-weight, how many passed and failed, which ones passed [N, A], the tests made, and whether
    one was invalid."""

    token: Int[Array, " N"]
    log_weight: Float[Array, " N"]
    passed: Int[Array, " N"]
    failed: Float[Array, " N"]
    log_failed: Float[Array, " N"]
    seen: Int[Array, "N A"]
    tests: Int[Array, " N"]
    invalid: Bool[Array, " N"]
    done: Bool[Array, " N"]


class _Rules(NamedTuple):
    """What a search does not change: p [N, V] and its mass, which rows search recursively, and the
    limits.
    """

    log_probs: Float[Array, "N V"]
    log_total: Float[Array, " N"]
    recursively: Bool[Array, " N"]
    max_accepts: int
    limit: float


class _Candidate(NamedTuple):
    """A round before its test: the token drawn, rows in which one was, the mass it was drawn from,
    and failures with those before it that only a draw with replacement would have made.
    """

    token: Int[Array, " N"]
    going: Bool[Array, " N"]
    log_rest: Float[Array, " N"]
    failed: Float[Array, " N"]
    log_phantoms: Float[Array, " N"]


def _search(
    keys: Key[Array, " N"],
    log_probs: Float[Array, "N V"],
    accepts: Accepts,
    recursively: Bool[Array, " N"],
    max_accepts: int,
    max_rejects: int | None,
) -> Weighted:
    """Both forms, row by row, in one loop: each round tests at most one candidate of every row that
    is not done.
    """
    _check(max_accepts, max_rejects)
    whole = everything(log_probs)
    log_total = jax.nn.logsumexp(whole.log_mass, axis=1)
    limit = math.inf if max_rejects is None else float(max_rejects)
    rules = _Rules(log_probs, log_total, recursively, max_accepts, limit)

    def body(carry: tuple) -> tuple:
        tick, rest, x = carry
        own = jax.vmap(lambda key: jax.random.split(jax.random.fold_in(key, tick), 3))(keys)
        drawn = _candidate(own, rules, rest, x)
        known = ~recursively & (x.seen == drawn.token[:, None]).any(1)
        needed = drawn.going & ~known
        said = accepts(drawn.token, needed)
        ok, wrong = said if isinstance(said, tuple) else (said, jnp.zeros(needed.shape, bool))
        hit, miss = drawn.going & (known | ok), drawn.going & ~(known | ok)
        rest = _removed(rules, rest, drawn, miss)
        x = x._replace(tests=x.tests + needed, invalid=x.invalid | (needed & wrong))
        return tick + 1, rest, _known(rules, x, drawn, hit, miss)

    start = jnp.int32(0), whole, _nothing_found(log_probs.shape[0], max_accepts)
    _, _, x = jax.lax.while_loop(lambda carry: ~carry[2].done.all(), body, start)
    log_weight = jnp.where(recursively, x.log_weight, log_total + _log_share(x, max_accepts, limit))
    return Weighted(x.token, jnp.where(x.passed > 0, log_weight, -jnp.inf), x.tests, x.invalid)


def _candidate(keys: Key[Array, "N 3"], rules: _Rules, rest: Rest, x: _Found) -> _Candidate:
    """A token of every row from what is left, and what stands before it."""
    log_rest = jax.nn.logsumexp(rest.log_mass, axis=1)
    log_success = log_rest - rules.log_total
    log_phantoms = jnp.where(x.done, -jnp.inf, _log_phantoms(keys[:, 2], log_success))
    # Finite: e^80 is close to float32's end.
    phantoms = jnp.round(jnp.exp(jnp.minimum(log_phantoms, 80.0)))
    failed = jnp.minimum(x.failed + phantoms, rules.limit)
    failed = jnp.where(rules.recursively, x.failed, failed)
    # Nothing is left to draw if all was rejected, or the row never had a (finite) mass.
    possible = jnp.isfinite(log_rest) & (rules.recursively | (failed < rules.limit))
    token = pick(keys[:, :2], rest)
    return _Candidate(token, ~x.done & possible, log_rest, failed, log_phantoms)


def _removed(rules: _Rules, rest: Rest, drawn: _Candidate, miss: Bool[Array, " N"]) -> Rest:
    """Recursive rows never draw a token twice; geometric rows may draw again what passed."""
    going, recursively = drawn.going, rules.recursively
    return remove(rest, drawn.token, going & (recursively | miss))


def _known(
    rules: _Rules,
    x: _Found,
    drawn: _Candidate,
    hit: Bool[Array, " N"],
    miss: Bool[Array, " N"],
) -> _Found:
    """What the rows know after the test, which is counted already."""
    token, log_rest = drawn.token, drawn.log_rest
    first, passed, failed = hit & (x.passed == 0), x.passed + hit, drawn.failed + miss
    log_v = at(rules.log_probs, x.token)
    log_weight = jnp.where(first, log_rest, jnp.where(miss & (x.passed > 0), log_v, x.log_weight))
    # If R and p(v) are one number in float32, a second test has nothing to tell.
    decided = jnp.where(first, at(rules.log_probs, token) >= log_rest, x.passed > 0)
    enough = (passed >= rules.max_accepts) | (failed >= rules.limit)
    enough = jnp.where(rules.recursively, decided | (x.tests >= rules.limit), enough)
    place = hit[:, None] & (jnp.arange(rules.max_accepts) == x.passed[:, None])
    missed = jnp.logaddexp(drawn.log_phantoms, jnp.where(miss, 0.0, -jnp.inf))
    return _Found(
        token=jnp.where(first, token, x.token),
        log_weight=log_weight,
        passed=passed,
        failed=failed,
        log_failed=jnp.logaddexp(x.log_failed, missed),
        seen=jnp.where(place, token[:, None], x.seen),
        tests=x.tests,
        invalid=x.invalid,
        done=~drawn.going | enough,
    )


def _nothing_found(num: int, max_accepts: int) -> _Found:
    zeros, log_zero = jnp.zeros(num, jnp.int32), jnp.full(num, -jnp.inf)
    unseen = jnp.full((num, max_accepts), -1, jnp.int32)
    no = jnp.zeros(num, bool)
    return _Found(zeros, log_zero, zeros, jnp.zeros(num), log_zero, unseen, zeros, no, no)


def _log_share(x: _Found, max_accepts: int, limit: float) -> Float[Array, " N"]:
    """Log of the estimated share of p that passes, under inverse sampling with both limits."""
    log_trials = jnp.log(jnp.maximum(x.passed + x.failed - 1, 1))
    log_trials = jnp.where(
        x.failed < math.exp(MANY), log_trials, jnp.minimum(x.log_failed, math.log(limit))
    )
    return jnp.log(jnp.minimum(max_accepts - 1, x.passed)) - log_trials


def _check(max_accepts: int, max_rejects: int | None) -> None:
    if max_accepts < 2:
        raise ValueError(
            f"expected max_accepts of at least 2, got {max_accepts}; one accepted token tells no"
            " weight"
        )
    if max_rejects is not None:
        check_count("max_rejects", max_rejects)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class AWRS(Proposal):
    """Draw from p^alpha times what the potential knows in advance, and test candidates with what it
    does not.

    A candidate passes if its factor is positive; a soft factor of the token that is drawn is paid
    by SMC as always. So the potential is asked about few tokens per step instead of all V: what a
    Python function, a parser or a checker needs.  `AWRS()` chooses the form for each row
    (`adaptive`); `AWRS.recursive()` and `AWRS.geometric()` fix it.  SMC asks once more about the
    token drawn, so a Python function of a text does well to be cached.

    State = tokens still to come [N], 0 once the string has ended: such a row is not tested.

    Attributes:
        form: `adaptive`, `recursive` or `geometric`.
        limits: its keyword arguments.

    Raises:
        ValueError: if `max_accepts` < 2 or `max_rejects` < 1.
    """

    form: Callable[..., Weighted] = dataclasses.field(default=adaptive, metadata={"static": True})
    limits: tuple[tuple[str, int | None], ...] = dataclasses.field(
        default=(), metadata={"static": True}
    )

    @classmethod
    def recursive(cls, max_rejects: int | None = None) -> AWRS:
        """The recursive form in every row; at most `max_rejects` tests."""
        _check(2, max_rejects)
        return cls(recursive, (("max_rejects", max_rejects),))

    @classmethod
    def geometric(cls, max_accepts: int = 2, max_rejects: int | None = None) -> AWRS:
        """The geometric form in every row, until `max_accepts` candidates have passed or
        `max_rejects` have failed.
        """
        _check(max_accepts, max_rejects)
        return cls(geometric, (("max_accepts", max_accepts), ("max_rejects", max_rejects)))

    def init(self, target: Target, num: int) -> State:
        return jnp.full(num, target.max_tokens, jnp.int32)

    def draw(
        self,
        keys: Key[Array, " N"],
        target: Target,
        logits: Float[Array, "N V"],
        potential: State,
        state: State,
    ) -> Draw:
        eos, left = target.lm.eos, state
        log_probs, wrong = _OPTIMAL.checked(target, logits, potential, ())
        log_probs = jnp.where((left > 0)[:, None], log_probs, -jnp.inf)
        phi, phi_state = _unknown(target.potential, potential, left.shape[0])
        judge = dataclasses.replace(target, potential=phi)

        def accepts(token: Int[Array, " N"], needed: Bool[Array, " N"]) -> tuple[Array, Array]:
            # EOS in rows that are not needed: no Python function is asked about those.
            _, log_factor, invalid = judge.factor(
                phi_state, jnp.where(needed, token, eos), needed, left == 1
            )
            return log_factor > -jnp.inf, invalid

        token, log_weight, tests, invalid = self.form(keys, log_probs, accepts, **dict(self.limits))
        log_p = jnp.take_along_axis(log_probs, token[:, None], axis=1)[:, 0]
        dead = jnp.isneginf(log_weight)
        # A row of weight 0 takes EOS, after which it is not tested again.
        return Draw(
            token=jnp.where(dead, eos, token),
            log_q=jnp.where(dead, jnp.inf, log_p - log_weight),
            potential_calls=tests,
            invalid=invalid | (wrong & (left > 0)),
        )

    def update(self, target: Target, state: State, token: Int[Array, " N"]) -> State:
        return jnp.where(token == target.lm.eos, 0, state - 1)


def _unknown(potential: Potential, state: State, num: int) -> tuple[Product, State]:
    """The parts of a potential that it cannot tell in advance, as a product, with its state.

    What is known (`lookahead`) is in the law that candidates are drawn from; testing it again would
    run a second language model for each candidate.
    """
    pairs = zip(potential.parts, potential.part_states(state), strict=True)
    return Product.joined([(part, s) for part, s in pairs if part.lookahead(s) is None], num)
