"""Laws of the next token: what a proposal is (`proposals` has those that there are)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from ppl.draw import categorical
from ppl.potential import State
from ppl.pytrees import register_dataclass
from ppl.rows import take_rows, valid
from ppl.showing import shown
from ppl.target import Target

Law = Callable[[Target, Float[Array, "N V"], State], Float[Array, "N V"]]


@shown
class Draw(NamedTuple):
    """Tokens [N], log q [N], how often each row asked the potential [N] (None: not at all), and
    whether something that its law was made of was NaN or +inf [N] (None: nothing).

    E[exp(-log_q) f(token)] = sum_v f(v) over the support.
    """

    token: Int[Array, " N"]
    log_q: Float[Array, " N"]
    potential_calls: Int[Array, " N"] | None = None
    invalid: Bool[Array, " N"] | None = None


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Proposal:
    """Base class of proposals with a state: subclasses, under `ppl.register_dataclass`, define
    `law` (or `draw`).

    Every leaf of a state has the particle axis N first.
    """

    @property
    def guides(self) -> tuple[Target, ...]:
        """Other language models that read every token, each in a pass of its own."""
        return ()

    @property
    def has_law(self) -> bool:
        """Whether it defines `law`; otherwise it can only draw."""
        return type(self).law is not Proposal.law

    @property
    def covers(self) -> bool:
        """Whether its law is positive wherever the target's one-step law is, by what it is.

        Of the others `growing.token` measures how much of the target they leave out.
        """
        return False

    @property
    def blind(self) -> bool:
        """Whether its law leaves the target's look-ahead unread, by what it is."""
        return False

    def init(self, target: Target, num: int) -> State:
        """The state of `num` empty strings."""
        return ()

    def law(
        self, target: Target, logits: Float[Array, "N V"], potential: State, state: State
    ) -> Float[Array, "N V"] | None:
        """Unnormalised log-probabilities of every next token; None if they cannot be had (then
        `draw` is defined).  NaN and +inf are no mass (`checked`).
        """
        return None

    def checked(
        self, target: Target, logits: Float[Array, "N V"], potential: State, state: State
    ) -> tuple[Float[Array, "N V"] | None, Bool[Array, " N"]]:
        """The law with -inf in the place of NaN and +inf, and which rows had some, in the law or in
        the target's look-ahead.
        """
        law, invalid = self.law(target, logits, potential, state), jnp.zeros(logits.shape[0], bool)
        ahead = None if self.blind or law is None else target.lookahead(potential)
        if law is not None:
            law, invalid = valid(law)
        return law, invalid if ahead is None else invalid | ahead.invalid

    def draw(
        self,
        keys: Key[Array, " N"],
        target: Target,
        logits: Float[Array, "N V"],
        potential: State,
        state: State,
    ) -> Draw:
        """Draw a token for every row."""
        law, invalid = self.checked(target, logits, potential, state)
        if law is None:
            raise TypeError(
                f"expected {type(self).__name__} to define law or draw, got neither; define one of"
                " them"
            )
        return Draw(*categorical(keys, law), invalid=invalid)

    def note(
        self,
        target: Target,
        logits: Float[Array, "N V"],
        potential: State,
        token: Int[Array, " N"],
    ) -> Float[Array, "N K"] | None:
        """What strings are to remember of a token besides its probabilities; None for nothing."""
        return None

    def update(self, target: Target, state: State, token: Int[Array, " N"]) -> State:
        """The state after `token`; called with EOS for strings that have ended, whose state no
        longer matters.
        """
        return state

    def reorder(self, state: State, ancestors: Int[Array, " N"]) -> State:
        """Rows `ancestors` of the state."""
        return take_rows(state, ancestors)
