"""Twists of canvases: functions psi(c) by which canvases are weighed before they are full.

A twist sees the law e_i of every site, a point mass where the site is open.  It changes no law,
only variances: what is weighed by psi is divided by it again (`unmasking`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from ppl.canvas import CanvasTarget
from ppl.checks import check_function
from ppl.draw import categorical
from ppl.pytrees import as_pytree, register_dataclass
from ppl.sequences import from_tokens
from ppl.token_automaton import TokenAutomaton
from ppl.token_tables import EOS_CLASS

Laws = Float[Array, "N L V"]
"""log e_i(v), normalised."""


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Plain:
    """psi = 1."""

    guides: ClassVar[bool] = False

    def log_psi(self, laws: Laws) -> Float[Array, " N"]:
        return jnp.zeros(laws.shape[0], jnp.float32)

    def draw(self, keys: Key[Array, " N"], laws: Laws, at: Int[Array, "N K"]) -> Int[Array, "N K"]:
        """Tokens of the sites `at`, each by its own law."""
        here = jnp.take_along_axis(laws, at[:, :, None], axis=1)
        each = jax.vmap(lambda key: jax.random.split(key, at.shape[1]))(keys)
        token, _ = categorical(each.reshape(-1), here.reshape(-1, laws.shape[2]))
        return token.reshape(at.shape)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Steering(Plain):
    """psi(c) = exp(score(string(x))), x the canvas with every site's most probable token."""

    score: Any
    eos: int = dataclasses.field(metadata={"static": True})

    def log_psi(self, laws: Laws) -> Float[Array, " N"]:
        x = from_tokens(laws.argmax(2).astype(jnp.int32), self.eos)
        return jnp.asarray(self.score(x.tokens, x.length), jnp.float32)


def steering(target: CanvasTarget, score: Callable[[Any, Any], Any]) -> Steering:
    """Feynman-Kac steering (arXiv 2501.06848) by a score (tokens [N, L], length [N]) -> [N] of what
    the canvas would be were it filled now: usually lambda times the target's reward.

    Raises:
        ValueError: if `score` is no such function.
    """
    check_function("score", score, "(tokens, length)", "jax.numpy.minimum")
    return Steering(as_pytree(score), target.lm.eos)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Regular(Plain):
    """psi(c) = P(an automaton accepts string(x)) if every site is drawn from its own law.

    With the automaton's table tau over sites, state Q - 1 being "ended",

        B_L(q) = [q accepts],   B_i(q) = sum_v e_i(v) B_{i+1}(tau(q, v)),   psi = B_0(start),

    and all sites are drawn together, given that they are accepted: x_i ~ e_i(v) B_{i+1}(tau(q, v)).

    Attributes:
        classes: [V] the class of a token.
        transitions: [Q, C].
        accepting: [Q] 1 or 0.
    """

    guides: ClassVar[bool] = True

    classes: Int[Array, " V"]
    transitions: Int[Array, "Q C"]
    accepting: Float[Array, " Q"]

    def log_psi(self, laws: Laws) -> Float[Array, " N"]:
        _, first, log_scale = self._backward(laws)
        return jnp.log(first[:, 0]) + log_scale

    def draw(self, keys: Key[Array, " N"], laws: Laws, at: Int[Array, "N K"]) -> Int[Array, "N K"]:
        length, start = laws.shape[1], jnp.zeros(laws.shape[0], jnp.int32)
        after, _, _ = self._backward(laws)
        each = jax.vmap(lambda key: jax.random.split(key, length))(keys)

        def site(state: Array, given: tuple[Array, Array, Array]) -> tuple[Array, Array]:
            keys, law, after = given
            to = self.transitions[state]
            worth = jnp.log(jnp.take_along_axis(after, to, axis=1))
            token, _ = categorical(keys, law + worth[:, self.classes])
            return jnp.take_along_axis(to, self.classes[token][:, None], axis=1)[:, 0], token

        given = jnp.swapaxes(each, 0, 1), jnp.swapaxes(laws, 0, 1), after
        tokens = jax.lax.scan(site, start, given)[1].T
        return jnp.take_along_axis(tokens, at, axis=1)

    def _backward(
        self, laws: Laws
    ) -> tuple[Float[Array, "L N Q"], Float[Array, "N Q"], Float[Array, " N"]]:
        """B_{i+1} of every site, each up to a factor; B_0 up to one, and its log."""
        num_classes = self.transitions.shape[1]
        mass = jnp.moveaxis(jnp.exp(laws), 2, 0)
        mass = jax.ops.segment_sum(mass, self.classes, num_classes).astype(jnp.float32)

        def site(carry: tuple[Array, Array], mass: Array) -> tuple[tuple[Array, Array], Array]:
            after, log_scale = carry
            before = (after[:, self.transitions] * mass[:, None]).sum(2)
            top = before.max(1)
            top = jnp.where(top > 0, top, 1.0)
            return (before / top[:, None], log_scale + jnp.log(top)), after

        num = laws.shape[0]
        last = jnp.broadcast_to(self.accepting, (num, *self.accepting.shape))
        start, by_site = (last, jnp.zeros(num, jnp.float32)), jnp.moveaxis(mass, (2, 0), (0, 2))
        (first, log_scale), after = jax.lax.scan(site, start, by_site, reverse=True)
        return after, first, log_scale


def regular(target: CanvasTarget) -> Regular:
    """The twist of the regular expression (or JSON schema) that the target is multiplied with.

    Constraints need no order from left to right: sites are drawn so that the whole can still be
    accepted, and there are no dead ends.  DINGO (arXiv 2505.23061) takes the most probable such
    canvas; this draws.

    Raises:
        ValueError: if the potential has not exactly one automaton with tables.
    """
    found = [part for part in target.potential.parts if isinstance(part, TokenAutomaton)]
    if len(found) != 1:
        raise ValueError(
            "expected a canvas with one regular constraint, got"
            f" {len(found)} among {[type(part).__name__ for part in target.potential.parts]};"
            " multiply it with ppl.regex(pattern, tok, canonical=False), and join several into one"
        )
    one = found[0]
    size, num_classes = one.transitions.shape
    accepts = one.distance == 0
    # EOS ends the string, after which anything may stand.
    rows = (
        one.transitions.astype(jnp.int32).at[:, EOS_CLASS].set(jnp.where(accepts, size, size - 1))
    )
    ended = jnp.full((1, num_classes), size, jnp.int32)
    accepting = jnp.append(accepts, True).astype(jnp.float32)
    return Regular(one.classes, jnp.concatenate([rows, ended]), accepting)
