"""Summaries: networks that turn an observation into the context of a conditional density.

    summary = summaries.identity()
    s = summary(key, simulations)     # built for what a simulator draws
    s(x)                              # one observation -> context [C]

A summary is a function (key, pilot) -> network; `pilot` are simulations, by which it standardises.

| what is observed | summary |
| --- | --- |
| a few numbers | `identity`, `mlp` |
| a set of observations in any order and number | `set_transformer` |
| a series, or a string over a small vocabulary | `sequence`, `one_hot` |
| a text | `language_features`: a frozen language model reads it |
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray
from paramax import NonTrainable, non_trainable, unwrap

from ppl.lm import LM
from ppl.sequences import from_tokens

from .simulators import Observation, Simulations

Reads = Callable[[Observation], Float[Array, " C"]]
"""A summary network: one observation -> context [C]."""

SCALED = 200
"""How many texts tell the scales of a language model's hidden states."""

Summary = Callable[[PRNGKeyArray, Simulations], Reads]
"""(key, pilot) -> a summary network for what a simulator draws."""


class Standardised(eqx.Module):
    """(values - location) / scale; a constant coordinate is only centred, and the last `unchanged`
    of them stay as they are.
    """

    location: NonTrainable[Float[Array, " D"]]
    scale: NonTrainable[Float[Array, " D"]]

    def __init__(self, rows: Float[Array, "N D"], unchanged: int = 0):
        spread, moved = rows.std(0), jnp.arange(rows.shape[1]) < rows.shape[1] - unchanged
        self.location = NonTrainable(jnp.where(moved, rows.mean(0), 0.0))
        self.scale = NonTrainable(jnp.where(moved & (spread > 0), spread, 1.0))

    def __call__(self, values: Float[Array, " D"]) -> Float[Array, " D"]:
        location, scale = unwrap((self.location, self.scale))
        return (values - location) / scale

    def inverse(self, values: Float[Array, " D"]) -> Float[Array, " D"]:
        """The values before."""
        location, scale = unwrap((self.location, self.scale))
        return location + scale * values

    @property
    def log_scale(self) -> Float[Array, ""]:
        """log |d values / d standardised|."""
        return jnp.log(unwrap(self.scale)).sum()


class Identity(eqx.Module):
    """All observed numbers, each standardised (`identity`)."""

    standard: Standardised

    def __call__(self, x: Observation) -> Float[Array, " C"]:
        return self.standard(flat(x))


class Dense(eqx.Module):
    """An MLP over all observed numbers, each standardised (`mlp`)."""

    standard: Standardised
    network: eqx.nn.MLP

    def __call__(self, x: Observation) -> Float[Array, " C"]:
        return self.network(self.standard(flat(x)))


class SetTransformer(eqx.Module):
    """Attention among the elements of a set, then pooled by learned queries (`set_transformer`)."""

    site: str = eqx.field(static=True)
    mask: str | None = eqx.field(static=True)
    standard: Standardised
    enter: eqx.nn.Linear
    blocks: list[Block]
    pool: eqx.nn.MultiheadAttention
    queries: Float[Array, "Q W"]

    def __call__(self, x: Observation) -> Float[Array, " C"]:
        rows = x[self.site].reshape(len(x[self.site]), -1)
        seen = jnp.ones(len(rows), bool) if self.mask is None else x[self.mask].astype(bool)
        values = jax.vmap(self.enter)(jax.vmap(self.standard)(rows))
        for block in self.blocks:
            values = block(values, seen)
        there = jnp.broadcast_to(seen, (len(self.queries), len(rows)))
        # Of an empty set nothing is known but that it is empty.
        pooled = jnp.where(seen.any(), self.pool(self.queries, values, values, there), 0.0)
        return jnp.append(jnp.ravel(pooled), seen.sum() / len(rows))


class Block(eqx.Module):
    """Attention and an MLP, each added to what came in, normalised before."""

    attention: eqx.nn.MultiheadAttention
    network: eqx.nn.MLP
    norms: tuple[eqx.nn.LayerNorm, eqx.nn.LayerNorm]

    def __init__(self, key: PRNGKeyArray, width: int, num_heads: int):
        first, second = jax.random.split(key)
        self.attention = eqx.nn.MultiheadAttention(num_heads, width, key=first)
        self.network = eqx.nn.MLP(width, width, 2 * width, 1, jax.nn.gelu, key=second)
        self.norms = eqx.nn.LayerNorm(width), eqx.nn.LayerNorm(width)

    def __call__(self, values: Float[Array, "M W"], seen: Bool[Array, " M"]) -> Float[Array, "M W"]:
        inside = jax.vmap(self.norms[0])(values)
        # Whoever is not there looks at itself, so that nobody looks at nothing.
        mask = seen[None, :] | jnp.eye(len(seen), dtype=bool)
        values = values + self.attention(inside, inside, inside, mask)
        return values + jax.vmap(self.network)(jax.vmap(self.norms[1])(values))


class Sequence(eqx.Module):
    """A recurrent network over a series (`sequence`)."""

    site: str = eqx.field(static=True)
    vocab_size: int | None = eqx.field(static=True)
    standard: Standardised
    cell: eqx.nn.GRUCell

    def __call__(self, x: Observation) -> Float[Array, " C"]:
        rows = _vectors(x[self.site], self.vocab_size)
        values = jax.vmap(self.standard)(rows)
        start = jnp.zeros(self.cell.hidden_size, jnp.result_type(values, self.cell.weight_hh))
        end, _ = jax.lax.scan(lambda state, row: (self.cell(row, state), None), start, values)
        return end


class LanguageFeatures(eqx.Module):
    """What a frozen language model makes of a text, and an MLP (`language_features`).

    Simulations that are stored are read by the model once (`fixed`).
    """

    site: str = eqx.field(static=True)
    lm: LM
    prompt: tuple[int, ...] = eqx.field(static=True)
    standard: Standardised
    network: eqx.nn.MLP

    def __call__(self, x: Observation) -> Float[Array, " C"]:
        read = x if self.name in x else self.fixed(x)
        return self.network(self.standard(read[self.name]))

    @property
    def name(self) -> str:
        """Of what is fixed, beside the observed sites."""
        return f"features of {self.site}"

    def fixed(self, x: Observation) -> Observation:
        """What no training changes: the hidden states, pooled, and the surprise."""
        return {self.name: _read(unwrap(self.lm), self.prompt, x[self.site])}


def identity() -> Summary:
    """All observed numbers in one vector, each standardised."""
    return lambda key, pilot: Identity(Standardised(jax.vmap(flat)(pilot.x)))


def mlp(*, size: int = 20, width: int = 50, depth: int = 2) -> Summary:
    """An MLP over all observed numbers that learns `size` of its own."""

    def build(key: PRNGKeyArray, pilot: Simulations) -> Dense:
        rows = jax.vmap(flat)(pilot.x)
        network = eqx.nn.MLP(rows.shape[1], size, width, depth, jax.nn.relu, key=key)
        return Dense(Standardised(rows), network)

    return build


def size(reads: Reads, pilot: Simulations) -> int:
    """C, of the contexts that a summary network makes."""
    first = jax.tree.map(lambda leaf: leaf[0], pilot.x)
    return jax.eval_shape(reads, first).shape[0]


def flat(x: Observation) -> Float[Array, " C"]:
    """All numbers of an observation, sites in the order of their names."""
    return jnp.concatenate([jnp.ravel(x[name]).astype(jnp.float32) for name in sorted(x)])


class OneHot(eqx.Module):
    """Every token of a short string as a unit vector (`one_hot`)."""

    vocab_size: int = eqx.field(static=True)

    def __call__(self, x: Observation) -> Float[Array, " C"]:
        return jnp.concatenate(
            [jnp.ravel(jax.nn.one_hot(x[name], self.vocab_size)) for name in sorted(x)]
        )


def one_hot(vocab_size: int) -> Summary:
    """Every token of short strings as a unit vector: for small vocabularies and horizons."""
    return lambda key, pilot: OneHot(vocab_size)


def set_transformer(
    site: str,
    *,
    mask: str | None = None,
    width: int = 32,
    num_heads: int = 4,
    num_blocks: int = 2,
    num_queries: int = 2,
) -> Summary:
    """A summary that does not depend on the order of M observations [M, ...] (Lee et al. 2019,
    arXiv 1810.00825).

    Args:
        site: the observed site [M, ...].
        mask: an observed site [M] that says which of them are there, where their number varies;
            what is not there has no influence, whatever its numbers.
        width, num_heads, num_blocks: of the attention.
        num_queries: the summary has num_queries * width numbers, and the share that is there.
    """

    def build(key: PRNGKeyArray, pilot: Simulations) -> SetTransformer:
        rows = pilot.x[site]
        flattened = rows.reshape(rows.shape[0] * rows.shape[1], -1)
        keys = jax.random.split(key, num_blocks + 3)
        return SetTransformer(
            site,
            mask,
            Standardised(flattened),
            eqx.nn.Linear(flattened.shape[1], width, key=keys[0]),
            [Block(key, width, num_heads) for key in keys[3:]],
            eqx.nn.MultiheadAttention(num_heads, width, key=keys[1]),
            jax.random.normal(keys[2], (num_queries, width)),
        )

    return build


def sequence(site: str, *, width: int = 64, vocab_size: int | None = None) -> Summary:
    """The last state of a gated recurrent network over a series [T, ...], or over tokens [T] of a
    small vocabulary.
    """

    def build(key: PRNGKeyArray, pilot: Simulations) -> Sequence:
        rows = jax.vmap(lambda row: _vectors(row, vocab_size))(pilot.x[site])
        flattened = rows.reshape(-1, rows.shape[-1])
        cell = eqx.nn.GRUCell(flattened.shape[1], width, key=key)
        return Sequence(site, vocab_size, Standardised(flattened), cell)

    return build


def language_features(
    site: str, lm: LM, prompt: Any, *, size: int = 20, width: int = 64, depth: int = 2
) -> Summary:
    """What a frozen language model makes of a text: its hidden states, their mean over the text's
    tokens and the last, and how surprised it is, then an MLP to `size` numbers.

    The surprise is the mean log-probability of a token and the mean entropy of its law; it tells,
    say, at what temperature a text was drawn.

    Args:
        site: the observed site, tokens [T] as `ppl.Text` has them.
        lm: a model with features (`LM.features`).
        prompt: tokens [S] that it reads before the text.

    Raises:
        ValueError: if the model has no features, when it is to read.
    """
    before = tuple(int(token) for token in prompt)

    def build(key: PRNGKeyArray, pilot: Simulations) -> LanguageFeatures:
        few = pilot.x[site][:SCALED]
        rows = jax.lax.map(lambda tokens: _read(lm, before, tokens), few, batch_size=50)
        network = eqx.nn.MLP(rows.shape[1], size, width, depth, jax.nn.gelu, key=key)
        return LanguageFeatures(site, non_trainable(lm), before, Standardised(rows), network)

    return build


def _vectors(rows: Array, vocab_size: int | None) -> Float[Array, "T F"]:
    if vocab_size is not None:
        return jax.nn.one_hot(rows, vocab_size)
    return rows.reshape(len(rows), -1).astype(jnp.float32)


def _read(lm: LM, prompt: tuple[int, ...], tokens: Int[Array, " T"]) -> Float[Array, " C"]:
    """Mean and last of the hidden states at a text's own tokens, EOS included; the mean of their
    log-probabilities, and of the entropies of their laws.
    """
    first = lm.features.prefill(jnp.asarray(prompt, jnp.int32))
    hidden = lm.features.extend(first, tokens[None])[0]
    num = jnp.minimum(from_tokens(tokens[None], lm.eos).length[0] + 1, len(tokens))
    inside = jnp.arange(len(tokens)) < num
    before = jnp.concatenate([first.logits[None], hidden[:-1]])
    log_probs = jax.nn.log_softmax(lm.logits(before))
    own = jnp.take_along_axis(log_probs, tokens[:, None], 1)[:, 0]
    surprise = jnp.stack([own, jax.scipy.special.entr(jnp.exp(log_probs)).sum(1)], 1)
    means = [(each * inside[:, None]).sum(0) / num for each in (hidden, surprise)]
    return jnp.concatenate([means[0], hidden[num - 1], means[1]]).astype(jnp.float32)
