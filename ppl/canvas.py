"""Targets over canvases: which law an any-order model is taken to have, and how it is tilted.

Of an any-order model one may mean

    process law             of the sampler that is declared: its policy of sites and its blocks
    order-and-string law    U(order) p_order(x), the order uniform; of x the mean over all orders
    left-to-right law       p_id(x): an ordinary language model (`CanvasTarget.left_to_right`)

They are one and the same where all d come from one joint law and a site is revealed at a time, and
three different ones otherwise.  `CanvasTarget` is the second, powered and tilted,

    gamma(order, x) = U(order) p_order(x)^alpha Phi(string(x)),

where string(x) are the tokens before the first EOS; a canvas without EOS is a string that the
horizon has cut.  What a sampler of the first samples says the sampler.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.scipy.special import gammaln
from jaxtyping import Array, Bool, Float, Int

from .any_order import AnyOrderLM, Prompt
from .lm import LM, LMFunctions, Prefix, reorder_rows
from .potential import Potential, Product, log_mask, scale
from .pytrees import register_dataclass
from .sequences import Sequences, from_tokens
from .showing import Words
from .space import Space
from .target import Target

BOS = 0
"""What stands for the empty prefix where an ordinary model needs a prompt of one token at least."""


@register_dataclass
@dataclasses.dataclass(frozen=True)
class CanvasTarget:
    """gamma(order, x) = U(order) p_order(x)^alpha Phi(string(x)) over orders of the sites that are
    not given, and their tokens.

    `lm.canvas(prompt, length=L)` makes one with alpha = 1 and Phi = 1; `target ** 4` powers
    p_order and Phi, `target * potential` tilts, as for `ppl.Target`.

    An order is told by ranks [N, L]: the site of rank 0 is revealed first; given sites have -1.

    Attributes:
        lm: the any-order model.
        prompt: its prompt.
        given: [L] tokens of the sites that are given, MASK elsewhere.
        alpha: [] the power; None is 1.
        potential: Phi; the empty product is 1.
    """

    lm: AnyOrderLM
    prompt: Prompt
    given: Int[Array, " L"]
    alpha: Float[Array, ""] | None = None
    potential: Potential = Product()

    @property
    def length(self) -> int:
        """L."""
        return self.given.shape[0]

    @property
    def space(self) -> Space:
        """What its strings are."""
        return self.lm.space(self.length)

    @property
    def open(self) -> Bool[Array, " L"]:
        """Which sites are to be drawn."""
        return self.given == self.lm.mask

    @property
    def tilted(self) -> bool:
        """Whether there is a potential."""
        return self.potential != Product()

    def _shown_(self) -> dict[str, Any]:
        return {
            "model": self.lm,
            "prompt_length": self.prompt.length,
            "length": self.length,
            "alpha": 1 if self.alpha is None else self.alpha,
            "potentials": [Words(type(part).__name__) for part in self.potential.parts],
        }

    def __mul__(self, other: Potential) -> CanvasTarget:
        if not isinstance(other, Potential):
            raise ValueError(
                f"expected a potential to multiply a canvas with, got {type(other).__name__}; write"
                " ppl.reward(f) for a function of (tokens, length), ppl.lm_potential(q) for a model"
            )
        return dataclasses.replace(self, potential=self.potential * other.within(self.space))

    __rmul__ = __mul__

    def __pow__(self, power: float | int | Float[Array, ""]) -> CanvasTarget:
        if not isinstance(power, Tracer) and not np.isfinite(power):
            raise ValueError(f"expected a finite power, got {power}; 4 sharpens, 0.5 flattens")
        power = jnp.asarray(power, jnp.float32)
        alpha = power if self.alpha is None else self.alpha * power
        potential = self.potential**power if self.tilted else self.potential
        return dataclasses.replace(self, alpha=alpha, potential=potential)

    def start(self, num: int) -> tuple[Int[Array, "N L"], Bool[Array, "N L"]]:
        """N canvases with what is given: tokens, and which sites are masked."""
        shape = (num, self.length)
        return jnp.broadcast_to(self.given, shape), jnp.broadcast_to(self.open, shape)

    def strings(self, tokens: Int[Array, "N L"]) -> Sequences:
        """string(x) of whole canvases."""
        return from_tokens(tokens, self.lm.eos)

    def denoise(
        self,
        tokens: Int[Array, "N L"],
        masked: Bool[Array, "N L"],
        at: Int[Array, "N K"] | None = None,
    ) -> Float[Array, "N K V"]:
        """`AnyOrderLM.denoise` after the prompt."""
        return self.lm.denoise(self.prompt, tokens, masked, at)

    # The referee.

    def log_density(self, tokens: Int[Array, "N L"], rank: Int[Array, "N L"]) -> Float[Array, " N"]:
        """log gamma of N orders and canvases, from scratch: the referee of every sampler.

        -inf of canvases that do not hold what is given, or whose ranks are no order of the others.

        Raises:
            ValueError: if the shapes are not those of N canvases.
        """
        self.check(tokens, rank)
        count = self.open.sum(dtype=jnp.int32)
        ordered = jnp.sort(jnp.where(self.open, rank, self.length), axis=1)
        places = jnp.arange(self.length, dtype=jnp.int32)
        good = ((ordered == places) | (places >= count)).all(1)
        log_p = self.log_prob(tokens, rank)
        log_p = log_p if self.alpha is None else scale(self.alpha, log_p)
        log_uniform = -gammaln(count.astype(jnp.float32) + 1)
        # MASK is no token: a canvas that is not full is none.
        good = good & (tokens != self.lm.mask).all(1)
        return jnp.where(good, log_uniform + log_p + self.log_potential(tokens), -jnp.inf)

    def log_prob(self, tokens: Int[Array, "N L"], rank: Int[Array, "N L"]) -> Float[Array, " N"]:
        """log of the product of d_i(x_i | sites of smaller rank) over all sites that are not given;
        -inf where what is given is not there.

        Sites of equal rank are revealed at once, each by its own law: the law of blocks.  Raises
        as `log_density`.
        """
        self.check(tokens, rank)
        return _log_prob(self, tokens, rank)

    def log_potential(self, tokens: Int[Array, "N L"]) -> Float[Array, " N"]:
        """log Phi(string(x)), from scratch."""
        if not self.tilted:
            return jnp.zeros(tokens.shape[0], jnp.float32)
        x = self.strings(tokens)
        return self._along(self.potential).log_potential(x.tokens, x.length)

    def check(self, tokens: Int[Array, "N L"], rank: Int[Array, "N L"]) -> None:
        """Raise ValueError unless these are N canvases and ranks."""
        if tokens.ndim != 2 or tokens.shape[1] != self.length or tokens.shape != rank.shape:
            raise ValueError(
                f"expected canvases and ranks [N, {self.length}], got {tokens.shape} and"
                f" {rank.shape}; a rank says when its site is revealed"
            )

    # The left-to-right law.

    def left_to_right(self) -> Target:
        """The same power and potential over strings, of the model that reveals its sites from left
        to right: an ordinary target, for every sampler of strings.

        Sites that are given are seen from the start, and are the only token of their place.  A
        token takes a pass over all L sites.  The horizon is L; beyond it only EOS follows.  A
        string that ends does not draw what is behind its EOS, so that p_id^alpha is of the string,
        and not, as here, of the canvas.
        """
        target = self._along(Product()).lm.given([BOS], max_tokens=self.length)
        return dataclasses.replace(target, alpha=self.alpha, potential=self.potential)

    def _along(self, potential: Potential) -> Target:
        """The left-to-right model with a potential, and no first pass."""
        plain = dataclasses.replace(self, alpha=None, potential=Product())
        size, eos = self.lm.vocab_size, self.lm.eos
        lm = LM(plain, None, LEFT_TO_RIGHT, size, eos, context=self.length + 1)
        nothing = Prefix(jnp.zeros(1, jnp.int32), jnp.int32(1), jnp.zeros(size, jnp.float32), None)
        return Target(lm, nothing, self.length, potential=potential)


def check_canvas(x: Any) -> None:
    """Raise ValueError unless `x` is a target over canvases."""
    if not isinstance(x, CanvasTarget):
        remedy = ""
        if isinstance(x, Target):
            remedy = "; strings are drawn by samplers.smc, canvases are of any-order models"
        raise ValueError(
            f"expected a target over canvases, got {type(x).__name__}; pass"
            f" lm.canvas(prompt, length=64), or that times potentials{remedy}"
        )


@jax.jit
def _log_prob(
    target: CanvasTarget, tokens: Int[Array, "N L"], rank: Int[Array, "N L"]
) -> Float[Array, " N"]:
    def body(total: Array, k: Array) -> tuple[Array, None]:
        masked = target.open & (rank >= k)
        log_d = target.denoise(tokens, masked)
        found = jnp.take_along_axis(log_d, tokens[:, :, None], axis=2)[:, :, 0]
        now = target.open & (rank == k)
        return total + jnp.where(now, found, 0.0).sum(1, dtype=jnp.float32), None

    there = (tokens == target.given) | target.open
    ranked = (rank >= 0) & (rank < target.length) | ~target.open
    ranks = jnp.arange(target.length, dtype=jnp.int32)
    known = jnp.clip(tokens, 0, target.lm.vocab_size - 1)
    total = jax.lax.scan(body, log_mask((there & ranked & (known == tokens)).all(1)), ranks)[0]
    return total


# The left-to-right model.  Its weights are a canvas; its first prompt token stands for the empty
# prefix, and others are the canvas's first sites.  A row of its cache is a canvas and how many
# tokens it has behind the prompt.


def _logits(
    canvas: CanvasTarget, tokens: Int[Array, "N L"], written: Int[Array, " N"]
) -> Float[Array, "N V"]:
    """Of the site behind the `written` ones."""
    sites = jnp.arange(canvas.length, dtype=jnp.int32)
    before = sites < written[:, None]
    here = jnp.minimum(written, canvas.length - 1)
    masked = canvas.open & ~before
    seen = jnp.where(before, tokens, canvas.given)
    log_d = canvas.denoise(seen, masked, here[:, None])[:, 0]
    ids = jnp.arange(canvas.lm.vocab_size)
    log_d = jnp.where(
        canvas.open[here][:, None], log_d, log_mask(ids == canvas.given[here][:, None])
    )
    full = (written >= canvas.length)[:, None]
    return jnp.where(full, log_mask(ids == canvas.lm.eos), log_d)


def _prefill(
    static: None, canvas: CanvasTarget, tokens: Int[Array, " S"], length: Int[Array, ""]
) -> tuple[Array, Array]:
    room = max(canvas.length - (tokens.shape[0] - 1), 0)
    first = jnp.pad(tokens[1:], (0, room))[: canvas.length].astype(jnp.int32)
    return first, _logits(canvas, first[None], (length - 1)[None])[0]


def _init(static: None, canvas: CanvasTarget, prefix: Prefix, num: int, max_tokens: int) -> tuple:
    return jnp.broadcast_to(prefix.data, (num, canvas.length)), jnp.zeros(num, jnp.int32)


def _step(
    static: None, canvas: CanvasTarget, prefix: Prefix, cache: tuple, token: Int[Array, " N"]
) -> tuple[tuple, Array]:
    tokens, used = cache
    written = prefix.length - 1 + used
    here = jnp.arange(canvas.length, dtype=jnp.int32) == written[:, None]
    tokens = jnp.where(here, token[:, None], tokens).astype(jnp.int32)
    return (tokens, used + 1), _logits(canvas, tokens, written + 1)


def _truncate(static: None, canvas: CanvasTarget, cache: tuple, length: Int[Array, " N"]) -> tuple:
    return cache[0], length.astype(jnp.int32)


LEFT_TO_RIGHT = LMFunctions(_prefill, _init, _step, _truncate, reorder_rows)
