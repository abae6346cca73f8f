"""What does a decode step cost beside the multiplications by its own weights?

    python -m experiments.bench.decode [--model smollm2-135m] [--particles 1 8 16 32] [--repeats 15]

A step of N particles is timed as samplers run it: many steps in one jit, the cache in the loop's
carry, the next token drawn from the logits.  The floor is the same loop with nothing but the step's
matrix products: same weights, shapes and layout.  Both are run in turns and the ratio is the median
over turns of step / floor, so that a busy machine slows both.  The last line printed is JSON.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from rich.console import Console
from rich.table import Table

import models
from models import transformer
from models.config import Rope
from models.ops import attention, norm, rope
from ppl import draw
from ppl.lm import LM, Cache, Prefix

from ..compilation import use_cache

PROMPT, STEPS = 128, 32


def loop(body: Callable[[Array, Any], Any], carry: Any) -> Any:
    """`body(t, carry)` STEPS times; a while loop, since samplers stop early."""
    _, carry = jax.lax.while_loop(
        lambda state: state[0] < STEPS, lambda s: (s[0] + 1, body(*s)), (jnp.int32(0), carry)
    )
    return carry


@functools.partial(jax.jit, static_argnames="num")
def decode(lm: LM, prefix: Prefix, key: Array, num: int) -> tuple[Array, Array]:
    """STEPS tokens of `num` particles: what is measured."""
    keys = jax.random.split(key, STEPS)

    def body(t: Array, carry: tuple[Cache, Array, Array]) -> tuple[Cache, Array, Array]:
        cache, logits, out = carry
        token, _ = draw.categorical(jax.random.split(keys[t], num), logits)
        cache, logits = lm.step(prefix, cache, token)
        return cache, logits, out.at[t].set(token)

    logits = jnp.broadcast_to(prefix.logits, (num, lm.vocab_size))
    _, logits, out = loop(
        body, (lm.init(prefix, num, STEPS), logits, jnp.zeros((STEPS, num), jnp.int32))
    )
    return out, logits


@functools.partial(jax.jit, static_argnames="num")
def floor(lm: LM, num: int) -> tuple[Array, Array]:
    """STEPS times the matrix products of a step; outputs are clipped and shifted only to stay
    finite and nonzero.
    """
    params: Any = lm.params
    config: Any = lm.static
    start = jnp.linspace(-1.0, 1.0, num * config.hidden_size, dtype=params["embed"].dtype).reshape(
        num, -1
    )

    def product(x: Array, weights: Any) -> Array:
        inputs = weights["kernel"].shape[0]
        return jnp.clip(x[:, :inputs], -1.0, 1.0) @ weights["kernel"]

    def body(_: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        x = carry[0]
        for weights in params["layers"]:
            x = product(product(x, weights["qkv"]), weights["out"]) + start
            x = product(product(x, weights["up"]), weights["down"]) + start
        head = params["embed"] if config.tied else params["head"]
        return x, jnp.einsum(
            "nd,vd->nv", jnp.clip(x, -1.0, 1.0), head, preferred_element_type=jnp.float32
        )

    return loop(body, (start, jnp.zeros((num, lm.vocab_size))))


def _write(t: Array, carry: tuple[Cache, Array]) -> tuple[Cache, Array]:
    cache, x = carry
    key = x[:, : cache.suffixes[0].key.shape[1]]
    suffixes = tuple(attention.append(suffix, key, key, cache.length) for suffix in cache.suffixes)
    return transformer.Cache(suffixes, cache.length + 1), x * 0.99


def _attend(
    config: Any, prefix: Prefix, t: Array, carry: tuple[Cache, Array]
) -> tuple[Cache, Array]:
    cache, x = _write(t, carry)
    score = attention.Score(config.attention_scale, config.attention_softcap)
    bias = attention.bias(prefix.tokens.shape[0], prefix.length, STEPS, carry[0].length, None)
    for prompt, suffix in zip(prefix.data, cache.suffixes, strict=True):
        x = attention.shared_prompt(x, prompt, suffix, bias, score)
    return cache, x


def _pointwise(config: Any, params: Any, t: Array, x: Array) -> Array:
    where = jnp.full(x.shape[0], t)
    turns = rope.angles(config.layers[0].rope or Rope(1e4), config.head_dim, where)
    of_heads = config.num_heads * config.head_dim
    for weights in params["layers"]:
        x = norm.rms(x, weights["attention_norm"]["scale"], config.norm_eps)
        wide = jnp.concatenate([x] * -(-of_heads // x.shape[1]), axis=1)
        heads = wide[:, :of_heads].reshape(x.shape[0], -1, config.head_dim)
        x = x + rope.rotate(heads, turns).reshape(x.shape[0], -1)[:, : x.shape[1]]
        x = norm.rms(x, weights["mlp_norm"]["scale"], config.norm_eps)
        wide = jnp.concatenate([x] * -(-config.intermediate_size // x.shape[1]), axis=1)
        x = x + (jax.nn.silu(wide) * wide)[:, : x.shape[1]]
    return x


def _sample(t: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
    token, logits = carry
    keys = jax.random.split(jax.random.fold_in(jax.random.key(0), t), token.shape[0])
    token, _ = draw.categorical(keys, logits)
    return token, logits.at[:, 0].add(token.astype(jnp.float32) * 1e-9)


def parts(lm: LM, prefix: Prefix, num: int) -> dict[str, Callable[[], Any]]:
    """The other work of a step, each kind by itself in the same loop."""
    config: Any = lm.static
    params: Any = lm.params
    dtype = params["embed"].dtype
    queries = jnp.ones((num, config.num_heads, config.head_dim), dtype)
    cache = lm.init(prefix, num, STEPS)
    logits = jnp.broadcast_to(prefix.logits, (num, lm.vocab_size))
    attend = functools.partial(_attend, config, prefix)
    pointwise = functools.partial(_pointwise, config, params)
    states = {
        "cache writes": (_write, (cache, queries)),
        "attention + writes": (attend, (cache, queries)),
        "norms, rope, act.": (pointwise, jnp.ones((num, config.hidden_size), dtype)),
        "drawing tokens": (_sample, (jnp.zeros(num, jnp.int32), logits)),
    }
    return {
        name: functools.partial(jax.jit(functools.partial(loop, body)), state)
        for name, (body, state) in states.items()
    }


def in_turns(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, np.ndarray]:
    """Milliseconds per step of every run, [repeats] each; every turn runs all of them once."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        jax.block_until_ready(run())
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            times[name].append((time.perf_counter() - start) / STEPS * 1e3)
    return {name: np.asarray(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--particles", type=int, nargs="+", default=[1, 8, 16, 32])
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()

    use_cache()
    lm, _ = models.load(options.model)
    prompt = np.random.default_rng(0).integers(0, lm.vocab_size, PROMPT).tolist()
    prefix = lm.prefill(prompt)
    table = Table(
        title=f"{options.model}: milliseconds per decode step, {PROMPT}-token prompt, medians"
    )
    ratios = {}
    for num in options.particles:
        runs = {
            "step": functools.partial(decode, lm, prefix, jax.random.key(0), num),
            "floor": functools.partial(floor, lm, num),
            **parts(lm, prefix, num),
        }
        times = in_turns(runs, options.repeats)
        ratios[f"N={num}"] = round(float(np.median(times["step"] / times["floor"])), 3)
        if not table.columns:
            for column in ("N", *runs, "hand-over and other", "step / floor", "tokens/s"):
                table.add_column(column, justify="right")
        medians = {name: float(np.median(values)) for name, values in times.items()}
        rest = 2 * medians["step"] - sum(medians.values()) + medians["cache writes"]
        cells = [f"{value:.2f}" for value in (*medians.values(), rest)]
        table.add_row(
            str(num), *cells, f"{ratios[f'N={num}']:.3f}", f"{num / medians['step'] * 1e3:.0f}"
        )
    Console(width=150).print(table)
    print(json.dumps({"name": "decode", "ratios": ratios, "device": jax.devices()[0].device_kind}))


if __name__ == "__main__":
    main()
