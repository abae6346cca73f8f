"""What a training run is made of, and the one compiled program that makes its steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree
from paramax import NonTrainable

from ppl.pytrees import register_dataclass
from ppl.rows import take_rows
from ppl.showing import shown

Draw = Callable[[PRNGKeyArray, PyTree, PyTree], tuple[PyTree, PyTree]]
"""(key, params, data) -> (batch, data)."""

Loss = Callable[[PyTree, PRNGKeyArray, PyTree], tuple[Float[Array, ""], dict[str, Array]]]
"""(params, key, batch) -> (scalar, dict of scalars); a metric named `tokens` is summed, others are
averaged.
"""

Metrics = dict[str, Float[Array, ""]]

OURS = ("loss", "grad_norm", "skipped")
"""The metrics that a step reports besides those of the loss."""


@shown
@dataclasses.dataclass(frozen=True)
class Training:
    """What `fit.run` minimises; `dataclasses.replace(training, draw=...)` changes a part.

    Attributes:
        params: what is trained, a pytree, as it starts; leaves that are not floating-point arrays
            stay as they are, and so does what is in a `paramax.NonTrainable`.
        draw: makes a step's batch under the current parameters; no gradient passes through it.
        loss: of a batch.  Its randomness, dropout for example, comes from its key.
        data: what `draw` carries from step to step (a replay buffer, a cursor): arrays of fixed
            shapes.

    `draw` and `loss` may be pytrees (an `eqx.Module`, a registered dataclass, a
    `jax.tree_util.Partial`): their arrays are arguments of the compiled program, however large.
    What a plain function closes over becomes a constant in it.
    """

    params: PyTree
    draw: Draw
    loss: Loss
    data: PyTree = None


class Rows(eqx.Module):
    """A `draw` of some of N rows, with replacement."""

    rows: PyTree
    batch_size: int = eqx.field(static=True)

    def __call__(self, key: PRNGKeyArray, params: Any, data: None) -> tuple[PyTree, None]:
        del params
        num = len(jax.tree.leaves(self.rows)[0])
        picked = jax.random.randint(key, (self.batch_size,), 0, num, jnp.int32)
        return take_rows(self.rows, picked), data


@register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """What a step changes."""

    params: PyTree
    opt_state: PyTree
    data: PyTree


@shown
class Method(NamedTuple):
    """What no step changes; its arrays are arguments of the program.

    key: of the whole run.  fixed: the leaves of the parameters that are not trained; the rest is
    None.  accumulate: draws to a step.  chunk: the most steps of one call.
    """

    key: PRNGKeyArray
    draw: Draw
    loss: Loss
    fixed: PyTree
    optimizer: optax.GradientTransformation
    max_grad_norm: float | None = None
    accumulate: int = 1
    chunk: int = 1


def trained_part(params: PyTree) -> tuple[PyTree, PyTree]:
    """What of parameters is trained, and the rest, each with None where the other has something."""
    return eqx.partition(
        params, eqx.is_inexact_array, is_leaf=lambda node: isinstance(node, NonTrainable)
    )


def own(leaf: Any) -> Any:
    """A copy with a type of its own: weakly typed leaves would become strong ones on their way
    through the loop.
    """
    return jnp.array(leaf, jnp.result_type(leaf)) if eqx.is_array_like(leaf) else leaf


def initial(how: Method, params: PyTree, data: PyTree) -> State:
    """The state before the first step."""
    return State(params, jax.tree.map(own, how.optimizer.init(params)), data)


def metric_names(how: Method, state: State) -> list[str]:
    """The names of all metrics, in order; nothing is computed.

    Raises:
        ValueError: if `draw` changes the shapes of its data, or the loss is no scalar or reports
            what is none, or under a name of ours.
    """
    params = eqx.combine(state.params, how.fixed)
    batch, after = eqx.filter_eval_shape(how.draw, how.key, params, state.data)
    before, returned = _shapes(state.data), _shapes(after)
    if before != returned or jax.tree.structure(state.data) != jax.tree.structure(after):
        raise ValueError(
            f"expected draw to return data of the shapes that it was given, {before}, got"
            f" {returned}; data is carried from step to step, so give it its final shapes and"
            " dtypes at the start"
        )
    value, metrics = eqx.filter_eval_shape(how.loss, params, how.key, batch)
    for name, metric in {"loss": value, **metrics}.items():
        if jnp.shape(metric) != ():
            raise ValueError(
                f"expected scalars of the loss, got {name} of shape {jnp.shape(metric)}; take its"
                " mean"
            )
    if taken := set(metrics) & set(OURS):
        raise ValueError(
            f"expected metrics of other names than {OURS}, got {sorted(taken)}; rename them"
        )
    return [*OURS, *metrics]


def _shapes(tree: PyTree) -> list[tuple[tuple[int, ...], Any]]:
    return [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)]


@eqx.filter_jit(donate="all-except-first")
def steps(
    what: tuple[Method, Any, Any], state: State
) -> tuple[State, dict[str, Float[Array, " chunk"]]]:
    """`num` steps from step `first` on, of a program for up to `chunk`: one compilation serves all.

    Takes (how, first, num) and the state, whose memory it uses; returns the state and every metric
    [chunk], of which the first `num` are made.
    """
    how, first, num = what
    names = jax.eval_shape(lambda state: step(how, state, jnp.int32(0))[1], state)
    rows = {name: jnp.zeros(how.chunk, jnp.float32) for name in names}

    def body(i: Int[Array, ""], carry: tuple[State, dict[str, Array]]) -> tuple[State, Any]:
        state, rows = carry
        state, metrics = step(how, state, first + i)
        return state, {name: values.at[i].set(metrics[name]) for name, values in rows.items()}

    return jax.lax.fori_loop(jnp.int32(0), num, body, (state, rows))


def step(how: Method, state: State, t: Int[Array, ""]) -> tuple[State, Metrics]:
    """Step number `t`: draws, gradients, and an update unless they are not finite; returns the
    state and metrics.
    """
    grads, data, metrics = _gradients(how, state, t)
    norm = optax.tree.norm(grads)
    if how.max_grad_norm is not None:
        clip = optax.clip_by_global_norm(how.max_grad_norm)
        grads, _ = clip.update(grads, clip.init(grads))
    updates, opt_state = how.optimizer.update(grads, state.opt_state, state.params)
    after = State(optax.apply_updates(state.params, updates), opt_state, data)
    finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
    state = jax.tree.map(lambda new, old: _kept(finite, new, old), after, state)
    ours = {"grad_norm": norm.astype(jnp.float32), "skipped": (~finite).astype(jnp.float32)}
    return state, metrics | ours


def _kept(finite: Array, new: Array, old: Array) -> Array:
    """What a step leaves, in the dtype that it found: an optimiser's schedule may compute in
    double precision.
    """
    return jnp.where(finite, jnp.asarray(new, old.dtype), old)


def _gradients(how: Method, state: State, t: Int[Array, ""]) -> tuple[PyTree, PyTree, Metrics]:
    """The mean gradients of `accumulate` draws, the data after them, and their metrics."""
    params = eqx.combine(state.params, how.fixed)

    def loss(trained: PyTree, key: PRNGKeyArray, batch: PyTree) -> tuple[Array, dict[str, Array]]:
        return how.loss(eqx.combine(trained, how.fixed), key, batch)

    def one(carry: tuple[PyTree, PyTree], key: PRNGKeyArray) -> tuple[tuple[Any, Any], Metrics]:
        data, total = carry
        draw_key, loss_key = jax.random.split(key)
        batch, data = how.draw(draw_key, params, data)
        value_and_grad = jax.value_and_grad(loss, has_aux=True)
        (value, metrics), grads = value_and_grad(state.params, loss_key, batch)
        reported = {name: jnp.float32(x) for name, x in {"loss": value, **metrics}.items()}
        return (data, jax.tree.map(jnp.add, total, grads)), reported

    keys = jax.random.split(jax.random.fold_in(how.key, t), how.accumulate)
    carry = state.data, jax.tree.map(jnp.zeros_like, state.params)
    (data, total), rows = jax.lax.scan(one, carry, keys)
    grads = jax.tree.map(lambda leaf: leaf / how.accumulate, total)
    return (
        grads,
        data,
        {k: x.sum(dtype=x.dtype) if k == "tokens" else x.mean() for k, x in rows.items()},
    )
