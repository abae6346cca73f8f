"""What many tests share: small asymmetric models, enumeration by brute force, z-tests, distances, a
trace counter.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models import tabular
from ppl.lm import LM

String = tuple[int, ...]
"""The tokens before EOS; a string of fewer than T tokens ended by EOS, one of T was cut by the
horizon.
"""

Law = Mapping[String, float]
"""A probability (or weight) for every string."""

VOCAB_SIZE = 4
EOS = 1  # neither first nor last, so that an index off by one shows
MAX_TOKENS = 4
PROMPT = (2, 0)


@functools.cache
def markov() -> LM:
    """An asymmetric Markov chain, V = 4."""
    return tabular.random_markov(jax.random.key(11), VOCAB_SIZE, eos=EOS)


@functools.cache
def table() -> LM:
    """An asymmetric prefix table, V = 4, a token deeper than `PROMPT` and `MAX_TOKENS` need: beyond
    its depth a table always ends, which hides what goes on past the horizon.
    """
    depth = MAX_TOKENS + len(PROMPT)
    lm = tabular.random_table(jax.random.key(12), VOCAB_SIZE, depth - 1, eos=EOS)
    more = tabular.random_table(jax.random.key(14), VOCAB_SIZE, depth, eos=EOS)
    return tabular.table(jnp.concatenate([lm.params, more.params[len(lm.params) :]]), eos=EOS)


@functools.cache
def hmm() -> LM:
    """An asymmetric hidden Markov model, V = 4, K = 3."""
    return tabular.random_hmm(jax.random.key(13), 3, VOCAB_SIZE, eos=EOS)


MODELS: dict[str, Callable[[], LM]] = {"markov": markov, "table": table, "hmm": hmm}
"""For `pytest.mark.parametrize("name", MODELS)`; all take `PROMPT` and `MAX_TOKENS`."""


@dataclasses.dataclass(frozen=True)
class Letters:
    """A tokenizer of the small models, whose tokens share letters."""

    token_bytes: tuple[bytes | None, ...] = (b"a", None, b"ba", b"b")
    eos: int = EOS
    vocab_size: int = VOCAB_SIZE

    def completes(self, x: String, delimiters: Sequence[str]) -> bool:
        """Whether one of some texts ends inside of the last token of x."""
        parts = [(self.token_bytes[token] or b"").decode() for token in x]
        text, before = "".join(parts), len("".join(parts[:-1]))
        ends = range(before + 1, len(text) + 1)
        return any(text[:end].endswith(d) for end in ends for d in delimiters)


def strings(vocab_size: int, max_tokens: int, eos: int) -> Iterator[String]:
    """Every string of at most `max_tokens` tokens."""
    alphabet = [token for token in range(vocab_size) if token != eos]
    for length in range(max_tokens + 1):
        yield from itertools.product(alphabet, repeat=length)


def as_arrays(batch: Sequence[String], max_tokens: int, eos: int) -> tuple[jax.Array, jax.Array]:
    """Strings as (tokens [N, T], length [N]), padded with EOS."""
    tokens = np.full((len(batch), max_tokens), eos, np.int32)
    for row, string in enumerate(batch):
        tokens[row, : len(string)] = string
    return jnp.asarray(tokens), jnp.asarray([len(string) for string in batch], jnp.int32)


def as_strings(tokens: Any, length: Any) -> list[String]:
    """The inverse of `as_arrays`."""
    return [
        tuple(row[:n].tolist())
        for row, n in zip(np.asarray(tokens), np.asarray(length), strict=True)
    ]


def brute_force_law(
    lm: LM, prompt: Sequence[int], max_tokens: int, alpha: float = 1.0
) -> tuple[dict[String, float], float]:
    """The law proportional to p(x | prompt)^alpha and its log Z, by one full pass per prefix; never
    calls `step`.
    """
    batch = list(strings(lm.vocab_size, max_tokens, lm.eos))
    suffixes, length = as_arrays(batch, max_tokens, lm.eos)
    prompts = jnp.broadcast_to(jnp.asarray(prompt, jnp.int32), (len(batch), len(prompt)))
    logits = _full_passes(lm, jnp.concatenate([prompts, suffixes], axis=1), len(prompt) + length)
    log_probs = dict(zip(batch, np.asarray(jax.nn.log_softmax(logits), np.float64), strict=True))

    def weight(string: String) -> float:
        ending = (lm.eos,) if len(string) < max_tokens else ()
        steps = [log_probs[string[:t]][token] for t, token in enumerate(string + ending)]
        return float(np.exp(alpha * np.sum(steps))) if np.all(np.isfinite(steps)) else 0.0

    weights = {string: weight(string) for string in batch}
    total = sum(weights.values())
    return {string: w / total for string, w in weights.items() if w > 0}, float(np.log(total))


@jax.jit
def _full_passes(lm: LM, tokens: jax.Array, length: jax.Array) -> jax.Array:
    return jax.vmap(lambda row, n: lm.functions.prefill(lm.static, lm.params, row, n)[1])(
        tokens, length
    )


def law_of(tokens: Any, length: Any, log_density: Any) -> dict[String, float]:
    """The normalised law of enumerated strings (each once) with their log-densities."""
    log_density = np.asarray(log_density, np.float64)
    weights = np.exp(log_density - log_density.max())
    weights /= weights.sum()
    return {
        string: float(w)
        for string, w in zip(as_strings(tokens, length), weights, strict=True)
        if w > 0
    }


def population_law(tokens: Any, length: Any, log_weights: Any = None) -> dict[String, float]:
    """The normalised law of a weighted population; duplicates merge.  No log_weights: all equal."""
    batch = as_strings(tokens, length)
    log_weights = (
        np.zeros(len(batch)) if log_weights is None else np.asarray(log_weights, np.float64)
    )
    weights = np.exp(log_weights - log_weights.max())
    law: dict[String, float] = {}
    for string, w in zip(batch, weights / weights.sum(), strict=True):
        law[string] = law.get(string, 0.0) + float(w)
    return law


def total_variation(p: Law, q: Law) -> float:
    """Total variation distance of two laws: half the sum of absolute differences."""
    return 0.5 * sum(abs(p.get(string, 0.0) - q.get(string, 0.0)) for string in {*p, *q})


def z_score(samples: Any, truth: float) -> tuple[float, float]:
    """(mean - truth) / SE of independent samples, and SE.  Without any spread: 0 if the mean is
    right, else inf.
    """
    samples = np.asarray(samples, np.float64).ravel()
    mean, se = samples.mean(), samples.std(ddof=1) / np.sqrt(samples.size)
    if se <= 1e-6 * max(1.0, abs(truth)):  # float32 noise around a sampler of zero variance
        return (0.0 if np.isclose(mean, truth, rtol=1e-4, atol=1e-6) else np.inf), float(se)
    return float((mean - truth) / se), float(se)


def assert_z(samples: Any, truth: float, *, resolution: float, bound: float = 5.0) -> None:
    """The samples' mean is `truth`: |z| < bound, and SE <= resolution.

    A z-test with a large SE passes on anything, so `resolution` is to be a fraction of the smallest
    bug worth catching.
    """
    z, se = z_score(samples, truth)
    assert se <= resolution, (
        f"SE {se:.3g} exceeds the resolution {resolution:.3g}: more samples are needed"
    )
    assert abs(z) < bound, (
        f"z = {z:.2f}: mean {np.mean(samples):.6g}, truth {truth:.6g}, SE {se:.3g}"
    )


@dataclasses.dataclass(eq=False)  # jit wants a hashable function
class TraceCounter:
    """Wraps a function and counts its Python calls; under `jax.jit(counter)` these are traces."""

    function: Callable[..., Any]
    count: int = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.count += 1
        return self.function(*args, **kwargs)
