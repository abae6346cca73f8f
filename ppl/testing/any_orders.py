"""Is it an any-order model?  Every law of `AnyOrderLM.denoise` on random canvases."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PRNGKeyArray

from ..any_order import AnyOrderLM, Prompt, random_ranks
from ..canvas import CanvasTarget
from ..draw import categorical
from .laws import generator, require


def check_any_order(
    lm: AnyOrderLM,
    prompt: Sequence[int] | Int[Array, " S"] = (),
    *,
    key: PRNGKeyArray,
    length: int | None = None,
    num: int = 8,
    atol: float = 1e-3,
) -> float:
    """Assert that `lm` is an any-order model, and return how much its law depends on the order.

    Checked on random canvases: shapes, dtype and normalisation; what stands under masks has no
    effect, and MASK no probability; rows are independent of each other; `at` gives the rows of all
    sites; what stands behind the prompt has no effect; the same without jit.

    Args:
        lm: the model.
        prompt: token ids [S].
        key: the random canvases come from it.
        length: L; not needed if the model knows one.
        num: N >= 2 canvases.
        atol: greatest difference of two log-probabilities that counts as equal; raise it for
            bfloat16.

    Returns:
        The order spread, E |log p_s(x) - log p_s'(x)| in nats over random orders s, s' and N
        canvases that the model draws: 0 of consistent conditionals.  Where it is large, the three
        laws of `ppl.canvas` are far apart.

    Raises:
        AssertionError: naming the law that does not hold, where, and by how much.
        ValueError: if num < 2, or the prompt or the length is unusable.
    """
    if num < 2:
        raise ValueError(f"expected num of at least 2, to tell rows apart, got {num}")
    canvas, rng = lm.canvas(prompt, length=length), generator(key)
    tokens = rng.integers(lm.vocab_size, size=(num, canvas.length)).astype(np.int32)
    tokens = np.where(tokens == lm.mask, (tokens + 1) % lm.vocab_size, tokens)
    masked = rng.random(tokens.shape) < np.linspace(0.2, 1, num)[:, None]
    masked[:, 0] |= ~masked.any(1)
    checks = _Checks(canvas, tokens, masked, atol)
    checks.laws()
    checks.rows(rng.permutation(num))
    checks.sites(rng.integers(canvas.length, size=(num, 2)).astype(np.int32))
    checks.prompt()
    return float(_order_spread(key, canvas, num))


class _Checks:
    """The laws of `check_any_order` on canvases tokens, masked [N, L]."""

    def __init__(
        self, canvas: CanvasTarget, tokens: np.ndarray, masked: np.ndarray, atol: float
    ) -> None:
        self.canvas, self.tokens, self.masked, self.atol = canvas, tokens, masked, atol
        self.log_d = np.asarray(_denoised(canvas, tokens, masked))

    def same(self, what: str, got: Array, wanted: np.ndarray, rows: np.ndarray) -> None:
        """Assert that log-probabilities agree where sites are masked."""
        found = np.asarray(got)
        shapes = f"{what}: expected shape {wanted.shape}, got {found.shape}"
        require(found.shape == wanted.shape, shapes)
        far = ~np.isclose(found, wanted, rtol=0.0, atol=self.atol) & rows[:, :, None]
        place = tuple(int(i) for i in np.unravel_index(int(far.argmax()), far.shape))
        require(
            not far.any(),
            f"{what}: row {place[0]}, site {place[1]}, token {place[2]}: log-probability"
            f" {found[place]:.6g}, expected {wanted[place]:.6g}",
        )

    def laws(self) -> None:
        """Shapes, dtypes, normalisation, and what stands under masks."""
        lm, log_d, masked = self.canvas.lm, self.log_d, self.masked
        shape = (*masked.shape, lm.vocab_size)
        require(log_d.shape == shape, f"denoise must give logits {shape}, got {log_d.shape}")
        require(log_d.dtype == np.float32, f"denoise must give float32, got {log_d.dtype}")
        require(np.isneginf(log_d[masked][:, lm.mask]).all(), "MASK must have no probability")
        total = np.exp(log_d[masked]).sum(1)
        require(
            np.allclose(total, 1, atol=1e-4),
            "every masked site must have a law, without NaN or +inf; probabilities sum to"
            f" {total[np.abs(total - 1).argmax()]:.6g}",
        )
        other = np.where(masked, (self.tokens + 1) % lm.vocab_size, self.tokens)
        got = _denoised(self.canvas, other, masked)
        self.same("what stands under masks must have no effect", got, log_d, masked)

    def rows(self, order: np.ndarray) -> None:
        """Rows in another order, and alone."""
        tokens, masked = self.tokens, self.masked
        got = _denoised(self.canvas, tokens[order], masked[order])[np.argsort(order)]
        self.same("rows must be independent of each other", got, self.log_d, masked)
        each = [_denoised(self.canvas, tokens[i : i + 1], masked[i : i + 1])[0] for i in range(2)]
        what = "a row alone must be what it is among others"
        self.same(what, jnp.stack(each), self.log_d[:2], masked[:2])

    def sites(self, at: np.ndarray) -> None:
        """The sites `at` [N, K] alone, and all without jit."""
        tokens, masked = self.tokens, self.masked
        some = np.take_along_axis(self.log_d, at[:, :, None], axis=1)
        got = _denoised(self.canvas, tokens, masked, at)
        seen = np.take_along_axis(masked, at, axis=1)
        self.same("`at` must give the rows of all sites", got, some, seen)
        eager = self.canvas.denoise(jnp.asarray(tokens), jnp.asarray(masked))
        self.same("denoise without jit must be denoise", eager, self.log_d, masked)

    def prompt(self) -> None:
        """Another padding of the prompt."""
        padded = _padded_otherwise(self.canvas.lm, self.canvas.prompt)
        other = dataclasses.replace(self.canvas, prompt=padded)
        got = _denoised(other, self.tokens, self.masked)
        what = "what stands behind the prompt must have no effect"
        self.same(what, got, self.log_d, self.masked)


@jax.jit
def _denoised(canvas: CanvasTarget, tokens: Any, masked: Any, at: Any = None) -> Array:
    return canvas.denoise(jnp.asarray(tokens), jnp.asarray(masked), at)


def _padded_otherwise(lm: AnyOrderLM, prompt: Prompt) -> Prompt:
    places = np.arange(prompt.tokens.shape[0])
    tokens = jnp.where(places < prompt.length, prompt.tokens, (prompt.tokens + 1) % lm.vocab_size)
    data = lm.functions.prefill(lm.static, lm.params, tokens, prompt.length)
    return Prompt(tokens, prompt.length, data)


@jax.jit
def _spread(
    keys: Array, canvas: CanvasTarget, ranks: tuple[Int[Array, "N L"], Int[Array, "N L"]]
) -> Array:
    """Canvases drawn along the first order, and the difference of their laws."""
    tokens, masked = canvas.start(ranks[0].shape[0])
    total = jnp.zeros(tokens.shape[0], jnp.float32)
    for k in range(canvas.length):
        here = (ranks[0] == k).argmax(1)
        token, log_prob = categorical(keys[k], canvas.denoise(tokens, masked, here[:, None])[:, 0])
        at = jnp.arange(canvas.length) == here[:, None]
        tokens, masked = jnp.where(at, token[:, None], tokens), masked & ~at
        total = total + log_prob
    return jnp.abs(total - canvas.log_prob(tokens, ranks[1])).mean()


def _order_spread(key: PRNGKeyArray, canvas: CanvasTarget, num: int) -> Array:
    one, other, draw = jax.random.split(key, 3)
    _, masked = canvas.start(num)
    ranks = tuple(random_ranks(jax.random.split(k, num), masked) for k in (one, other))
    keys = jax.random.split(draw, (canvas.length, num))
    return _spread(keys, canvas, ranks)
