"""Rules that say when enough has been drawn: pure functions of what was seen so far.

    rule = rules.beta(0.95)
    seen = rule.step(rule.init(num_answers=3, max_draws=40), answer, score)
    rule.decide(seen)

Draws come one at a time and independently; a and b are the counts of the leading answer and of the
next one, n the draws.  A rule is a pytree whose leaves are its parameters: one program serves every
threshold, and `jax.vmap` over a rule made from an array of thresholds tries them together.  Answers
are ids 0..K-1; -1, no answer, is a draw that counts for nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

from ppl.checks import check_counts
from ppl.pytrees import register_dataclass

from ..base import X
from .leading import ahead, apart, leader, leads, log_evidence

Parameters = dict[str, Array]
"""The numbers of a rule, by name: its leaves."""


@register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Seen:
    """The sufficient statistics of the draws so far.

    Attributes:
        counts: [K] how often each answer came.
        num: [] n, draws without an answer included.
        more: what only this rule remembers, a pytree.
        max_draws: no more than this will be drawn.
    """

    counts: Int[Array, " K"]
    num: Int[Array, ""]
    more: X
    max_draws: int = dataclasses.field(metadata={"static": True})


def _nothing(num_answers: int) -> tuple:
    return ()


def _forget(parameters: Parameters, seen: Seen, answer: Array, score: Array) -> tuple:
    return ()


@register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Rule:
    """When to stop.

    Attributes:
        decision: (parameters, seen) -> [] whether to stop, asked after every draw.
        parameters: its numbers.
        start: K -> what it remembers beside counts, before the first draw.
        advance: (parameters, seen before the draw, answer, score) -> what it remembers then.
        reads_scores: so that it says nothing where strings have none.
    """

    decision: Callable[..., Any] = dataclasses.field(metadata={"static": True})
    parameters: Parameters
    start: Callable[[int], X] = dataclasses.field(default=_nothing, metadata={"static": True})
    advance: Callable[..., X] = dataclasses.field(default=_forget, metadata={"static": True})
    reads_scores: bool = dataclasses.field(default=False, metadata={"static": True})

    def init(self, num_answers: int, max_draws: int) -> Seen:
        """Before the first draw.

        Raises:
            ValueError: unless both are at least 1.
        """
        check_counts(num_answers=num_answers, max_draws=max_draws)
        return Seen(
            counts=jnp.zeros(num_answers, jnp.int32),
            num=jnp.int32(0),
            more=self.start(num_answers),
            max_draws=max_draws,
        )

    def step(self, seen: Seen, answer: Int[Array, ""], score: Float[Array, ""]) -> Seen:
        """After one more draw."""
        more = self.advance(self.parameters, seen, answer, score)
        here = jnp.arange(seen.counts.shape[0], dtype=jnp.int32) == answer
        counts = seen.counts + here.astype(jnp.int32)
        return dataclasses.replace(seen, counts=counts, num=seen.num + 1, more=more)

    def decide(self, seen: Seen) -> Bool[Array, ""]:
        """Whether to stop."""
        return self.decision(self.parameters, seen)


def check_scoreless(rule: Rule) -> None:
    """Raise ValueError if a rule reads scores, where there are none."""
    if rule.reads_scores:
        raise ValueError(
            "expected a rule over answers, got one that reads scores, of which there are none here;"
            " use stopping.replay, or stopping.online with scores"
        )


def beta(threshold: Any) -> Rule:
    """Adaptive consistency: stop when P(Beta(a+1, b+1) > 1/2) = I_1/2(b+1, a+1) >= `threshold`.

    A posterior of the two leading answers alone.  It promises nothing about errors: at a tie it
    declares a leader within 40 draws with probability 0.42 at 0.95.  Compare arXiv 2305.11860.

    Raises:
        ValueError: unless 1/2 < threshold < 1.
    """
    return Rule(decision=_beta, parameters={"threshold": _between(0.5, 1.0, threshold=threshold)})


def _beta(parameters: Parameters, seen: Seen) -> Bool[Array, ""]:
    _, first, second = leader(seen.counts)
    return ahead(first, second, seen.max_draws) >= parameters["threshold"]


def dirichlet(threshold: Any) -> Rule:
    """Stop when the leading answer is the most likely one with probability >= `threshold`.

    A posteriori, from a uniform prior on the laws of the K answers that were seen (at least two),

        P(a leads) = int Gamma(x; alpha_1) prod_{j > 1} P(alpha_j, x) dx,   alpha = count + 1

    by quadrature in sqrt(x), where every one of these laws is about as wide as every other.  With
    many rivals `beta` is too sure: 0.89 for counts (4, 1, 1, 1, 1, 1), where this is 0.67.

    Raises:
        ValueError: unless 0 < threshold < 1.
    """
    parameters = {"threshold": _between(0.0, 1.0, threshold=threshold)}
    return Rule(decision=_dirichlet, parameters=parameters)


def _dirichlet(parameters: Parameters, seen: Seen) -> Bool[Array, ""]:
    return leads(seen.counts, seen.max_draws) >= parameters["threshold"]


def window(width: Any) -> Rule:
    """ESC: draws come in windows of `width`; stop when all of a window give the same answer.

    With s = sum_a pi_a^w and at most L draws, a multiple of w, E[n] = w (1 - (1 - s)^(L / w)) / s.
    Compare arXiv 2401.10480.

    Raises:
        ValueError: unless width is at least 1.
    """
    parameters = {"width": _whole(width=width)}
    return Rule(decision=_window, parameters=parameters, start=_no_answer, advance=_shared)


def _no_answer(num_answers: int) -> Int[Array, ""]:
    return jnp.int32(-1)


def _shared(parameters: Parameters, seen: Seen, answer: Array, score: Array) -> Int[Array, ""]:
    """The answer of all draws of this window; -1 if they differ."""
    first = seen.num % parameters["width"] == 0
    return jnp.where(first | (seen.more == answer), answer, -1).astype(jnp.int32)


def _window(parameters: Parameters, seen: Seen) -> Bool[Array, ""]:
    return (seen.num % parameters["width"] == 0) & (seen.more >= 0)


def doubling(share: Any) -> Rule:
    """Look at n = 2, 4, 8, ... draws; stop when the leading answer has at least `share` of them.

    Raises:
        ValueError: unless 0 < share < 1.
    """
    return Rule(decision=_doubling, parameters={"share": _between(0.0, 1.0, share=share)})


def _doubling(parameters: Parameters, seen: Seen) -> Bool[Array, ""]:
    _, first, _ = leader(seen.counts)
    power_of_two = (seen.num >= 2) & (seen.num & (seen.num - 1) == 0)
    num = jnp.maximum(seen.num, 1).astype(jnp.float32)
    return power_of_two & (first.astype(jnp.float32) / num >= parameters["share"])


def entropy(threshold: Any, num: Any = 8) -> Rule:
    """Stop when the entropy of the answers is at most `threshold` nats, not before `num` draws.

    The plug-in estimate is too low by about (K - 1) / 2n, which is added (Miller and Madow); a
    single draw still has entropy 0, hence `num`.  Compare arXiv 2507.06829.

    Raises:
        ValueError: unless threshold > 0 and num is at least 1.
    """
    parameters = {"threshold": _between(0.0, np.inf, threshold=threshold)}
    return Rule(decision=_entropy, parameters=parameters | {"num": _whole(num=num)})


def _entropy(parameters: Parameters, seen: Seen) -> Bool[Array, ""]:
    counts = seen.counts.astype(jnp.float32)
    total, answers = counts.sum(), (seen.counts > 0).sum(dtype=jnp.int32)
    some = jnp.maximum(total, 1.0)
    plug_in = jnp.log(some) - (counts * jnp.log(jnp.maximum(counts, 1.0))).sum() / some
    corrected = plug_in + (answers - 1).astype(jnp.float32) / (2 * some)
    return (total > 0) & (seen.num >= parameters["num"]) & (corrected <= parameters["threshold"])


def stable(num: Any) -> Rule:
    """Stop when the last `num` draws gave the same answer (answer convergence).

    Made for the answers of one string at successive cues (arXiv 2506.02536); of independent draws
    it waits for a run.

    Raises:
        ValueError: unless num is at least 1.
    """
    parameters = {"num": _whole(num=num)}
    return Rule(decision=_stable, parameters=parameters, start=_no_run, advance=_run)


def _no_run(num_answers: int) -> dict[str, Array]:
    return {"answer": jnp.int32(-1), "length": jnp.int32(0)}


def _run(parameters: Parameters, seen: Seen, answer: Array, score: Array) -> dict[str, Array]:
    """The run of equal answers that the draw ends; what is longer than needed counts as `num`."""
    length = jnp.where(seen.more["answer"] == answer, seen.more["length"] + 1, 1)
    length = jnp.minimum(jnp.where(answer >= 0, length, 0), parameters["num"])
    return {"answer": answer.astype(jnp.int32), "length": length.astype(jnp.int32)}


def _stable(parameters: Parameters, seen: Seen) -> Bool[Array, ""]:
    return seen.more["length"] >= parameters["num"]


def fixed(num: Any) -> Rule:
    """Stop at `num` draws.

    Raises:
        ValueError: unless num is at least 1.
    """
    return Rule(decision=_fixed, parameters={"num": _whole(num=num)})


def _fixed(parameters: Parameters, seen: Seen) -> Bool[Array, ""]:
    return seen.num >= parameters["num"]


def secretary(num: int) -> Rule:
    """Of `num` scores watch the first num / e, then stop at the first that is higher than all
    before it.

    That one is the best of all `num` with probability 1/e in the limit, whatever the scores.  It
    is meant for a `select` that takes the best score, not for votes.

    Raises:
        ValueError: unless num is at least 1.
    """
    watch = jnp.floor(_whole(num=num) / np.e).astype(jnp.int32)
    return Rule(
        decision=_secretary,
        parameters={"watch": watch},
        start=_no_score,
        advance=_record,
        reads_scores=True,
    )


def _no_score(num_answers: int) -> dict[str, Array]:
    return {"best": jnp.float32(-jnp.inf), "record": jnp.bool_(False)}


def _record(parameters: Parameters, seen: Seen, answer: Array, score: Array) -> dict[str, Array]:
    best = seen.more["best"]
    return {"best": jnp.maximum(best, score), "record": score > best}


def _secretary(parameters: Parameters, seen: Seen) -> Bool[Array, ""]:
    return seen.more["record"] & (seen.num > parameters["watch"])


def evalue(delta: Any, num_answers: Any = None) -> Rule:
    """Stop on evidence: P(it ever stops while another answer is the most likely one) <= `delta`,
    however often it is asked, and whatever else may stop the draws.

    The evidence that the leader is likelier than another answer, from the draws of these two, is

        M(a, b) = 2 int_1/2^1 (2 t)^a (2 (1 - t))^b dt = 2^(a+b+1) B(a+1, b+1) I_1/2(b+1, a+1)

    whose expectation is at most 1 unless it is.  Of a closed set of K answers the leader needs
    M >= (K - 1) / delta against the runner-up.  Of an open set the j-th answer that was discovered
    needs M >= j (j + 1) / delta against every other one, counted from its discovery: so it takes
    two or three draws more.  By Ville's inequality and a union bound; the promise is about the
    majority of what was drawn.

    Args:
        delta: the probability of an error.
        num_answers: K, all answers that there are; None if that is not known.  A closed set that
            turns out to have more never stops.

    Raises:
        ValueError: unless 0 < delta < 1 and num_answers is at least 2.
    """
    parameters = {"delta": _between(0.0, 1.0, delta=delta)}
    if num_answers is None:
        return Rule(decision=_open, parameters=parameters, start=_undiscovered, advance=_discover)
    parameters |= {"num_answers": _whole(2, num_answers=num_answers)}
    return Rule(decision=_closed, parameters=parameters)


def _closed(parameters: Parameters, seen: Seen) -> Bool[Array, ""]:
    _, first, second = leader(seen.counts)
    num = parameters["num_answers"]
    needed = jnp.log(num.astype(jnp.float32) - 1) - jnp.log(parameters["delta"])
    known = (seen.counts > 0).sum(dtype=jnp.int32) <= num
    return known & (log_evidence(first, second, seen.max_draws) >= needed)


def _undiscovered(num_answers: int) -> dict[str, Array]:
    return {
        "place": jnp.zeros(num_answers, jnp.int32),
        "before": jnp.zeros((num_answers, num_answers), jnp.int32),
    }


def _discover(parameters: Parameters, seen: Seen, answer: Array, score: Array) -> dict[str, Array]:
    """place [K]: j of the j-th answer.  before [K, K]: the counts when an answer was discovered,
    that draw included.
    """
    place, before = seen.more["place"], seen.more["before"]
    new = (answer >= 0) & (seen.counts[answer] == 0)
    counts = seen.counts.at[answer].add(1)
    # What is not new is written to a row that there is not.
    row = jnp.where(new, answer, place.shape[0])
    found = (seen.counts > 0).sum(dtype=jnp.int32) + 1
    return {
        "place": place.at[row].set(found, mode="drop"),
        "before": before.at[row].set(counts, mode="drop"),
    }


def _open(parameters: Parameters, seen: Seen) -> Bool[Array, ""]:
    best, first, second = leader(seen.counts)
    since = seen.counts - seen.more["before"][best]
    _, rivals = apart(since, best)
    place = seen.more["place"][best].astype(jnp.float32)
    needed = jnp.log(jnp.maximum(place * (place + 1), 1.0)) - jnp.log(parameters["delta"])
    # A tie of the votes is broken by chance, so there is no leader to speak of.
    return (first > second) & (log_evidence(since[best], rivals, seen.max_draws) >= needed)


def _between(low: float, high: float, **named: Any) -> Float[Array, "..."]:
    """A number, or an array of them, of low < x < high."""
    [(name, value)] = named.items()
    if not isinstance(value, Tracer):
        x = np.asarray(value, np.float64)
        if not ((x > low) & (x < high)).all():
            raise ValueError(
                f"expected {name} between {low:g} and {high:g}, got {value!r}; pass e.g. {name}="
                f"{0.05 if name == 'delta' else 0.75}"
            )
    return jnp.asarray(value, jnp.float32)


def _whole(least: int = 1, **named: Any) -> Int[Array, "..."]:
    """A whole number, or an array of them, of at least `least`."""
    [(name, value)] = named.items()
    if not isinstance(value, Tracer):
        x = np.asarray(value)
        if x.dtype.kind not in "iu" or (x < least).any():
            raise ValueError(
                f"expected {name} to be a whole number of at least {least}, got {value!r}; pass"
                f" e.g. {name}={max(least, 5)}"
            )
    return jnp.asarray(value, jnp.int32)
