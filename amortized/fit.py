"""One compiled training loop for every objective: gradients, skipping, checkpoints, early stop, a
bar.

    def draw(key, params, data):             # strings drawn under the current parameters, without gradient
        return batch, data                   # `data` is carried: a replay buffer, a cursor

    def loss(params, key, batch):
        return value, {"elbo": elbo, "tokens": tokens}

    out = fit.run(key, params, loss, draw, optimizer=optax.adam(1e-3), num_steps=10_000)

Step t has the key fold_in(key, t), so that a longer run keeps its prefix, and one that was stopped
goes on to the same bits.  `loss` and `draw` may be pytrees (an `eqx.Module`, a registered
dataclass, `jax.tree_util.Partial`): their arrays are arguments of the compiled program, however
large.  What a plain function closes over becomes a constant in it: give frozen weights as
`Partial(loss, weights)`.

Parts of the parameters learn at rates of their own by `optax.multi_transform`, for example log Z:

    optimizer = optax.multi_transform(
        {"policy": optax.adam(1e-3), "log_z": optax.adam(1e-1)}, {"policy": "policy", "log_z":
        "log_z"}
    )
    fit.run(key, {"policy": weights, "log_z": jnp.float32(0)}, loss, draw, optimizer=optimizer,
    num_steps=1000)
"""

from __future__ import annotations

import dataclasses
import math
import signal
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from ppl.checks import check_count
from ppl.pytrees import register_dataclass
from ppl.showing import shown

from .checkpoints import Checkpoints
from .progress import Bar

Loss = Callable[[PyTree, PRNGKeyArray, PyTree], tuple[Float[Array, ""], dict[str, Array]]]
"""(params, key, batch) -> (scalar, dict of scalars); a metric named `tokens` is summed, others are
averaged.
"""

Draw = Callable[[PRNGKeyArray, PyTree, PyTree], tuple[PyTree, PyTree]]
"""(key, params, data) -> (batch, data)."""

History = dict[str, np.ndarray]

SECONDS = 0.5
"""About how long steps run before the bar moves and an interrupt is heeded; a single step may take
longer.
"""
OURS = ("loss", "grad_norm", "skipped")


@shown
@dataclasses.dataclass(frozen=True)
class Fitted:
    """A training run.

    Attributes:
        params: after the last step.
        best: with `patience`, the parameters after the best chunk; else `params`.
        history: every metric of every step [steps], on the host; `loss`, `grad_norm` (before
            clipping) and `skipped` besides what the loss reports.
        data: as `draw` left it.
        steps: how many were made, those of a resumed run included.
        stopped: "" if all steps were made, else why not: "patience", "interrupted", or "not finite"
            (a whole chunk was skipped).
    """

    params: PyTree
    best: PyTree
    history: History
    data: PyTree
    steps: int
    stopped: str

    @property
    def skipped(self) -> int:
        """How many steps had a loss or gradients that were not finite."""
        return int(self.history["skipped"].sum())


def mean_loss(rows: History) -> float:
    """The criterion that says which chunk is best, if no other is given."""
    return float(rows["loss"].mean())


def run(
    key: PRNGKeyArray,
    params: PyTree,
    loss: Loss,
    draw: Draw,
    data: PyTree = None,
    *,
    optimizer: optax.GradientTransformation,
    num_steps: int,
    max_grad_norm: float | None = None,
    accumulate: int = 1,
    chunk: int = 100,
    patience: int | None = None,
    criterion: Callable[[History], float] = mean_loss,
    directory: str | Path | None = None,
    save_every: int = 10,
    config: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Fitted:
    """Minimise a loss in one compiled loop.

    A step whose loss or gradients are not finite changes nothing (parameters, optimiser, data) and
    is counted.

    Args:
        key: typed key.
        params: what is trained, a pytree; leaves that are not floating-point arrays stay as they
            are.
        loss, draw: see `Loss` and `Draw`; both are compiled once for all steps.
        data: what `draw` carries: arrays of fixed shapes.
        optimizer: any of optax.
        num_steps: in all, those of a resumed run included.
        max_grad_norm: gradients are clipped to this global norm.
        accumulate: draws whose gradients are averaged in each step.
        chunk: steps between two looks at what `criterion` says.
        patience: stop after so many chunks without a better one, and keep the best parameters.
        criterion: chunk's history, skipped steps left out -> a number, the lower the better; by
            default the mean loss.
        directory: for checkpoints; a run that finds one there goes on from it, to the bits of a run
            never stopped.
        save_every: chunks from one checkpoint to the next; the last state is saved in any case.
        config: entries that a checkpoint must agree in, e.g. the learning rate; JSON.
        progress: show a bar where there is a terminal or a notebook.

    Returns:
        `Fitted`.  After an interrupt (Ctrl-C) it has what there was by then, saved; a second one
        raises.

    Raises:
        ValueError: if a count is not positive, `data` changes its shapes, the loss is no scalar or
            reports what is none, or the checkpoint in `directory` is of another run, or of more
            steps.
    """
    counts = {
        "num_steps": num_steps,
        "accumulate": accumulate,
        "chunk": chunk,
        "save_every": save_every,
    }
    for name, count in (
        counts.items() if patience is None else (counts | {"patience": patience}).items()
    ):
        check_count(name, count)
    # The program updates its state in place: the caller keeps his own.
    params, data = jax.tree.map(_own, (params, data))
    trained, fixed = eqx.partition(params, eqx.is_inexact_array)
    how = Method(key, loss, draw, fixed, optimizer, max_grad_norm, accumulate, chunk)
    rule, start = (
        _Rule(num_steps, chunk, patience, criterion),
        _start(how, trained, data, patience is not None),
    )
    if directory is None:
        return _fitted(fixed, *_train(how, rule, start, progress, lambda out, last: None))
    settings = {
        "max_grad_norm": max_grad_norm,
        "accumulate": accumulate,
        "chunk": chunk,
        "patience": patience,
    }
    with Checkpoints(directory, settings | dict(config or {})) as checkpoints:

        def save(out: _Run, last: bool) -> None:
            if last or out.step % (save_every * chunk) == 0:
                checkpoints.save(out.step, out.saved(key))

        return _fitted(
            fixed, *_train(how, rule, _resumed(checkpoints, key, start, num_steps), progress, save)
        )


@register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """What a step changes."""

    params: PyTree
    opt_state: PyTree
    data: PyTree


@shown
class Method(NamedTuple):
    """What no step changes; its arrays are arguments of the program.  fixed: the parameters' leaves
    not trained.
    """

    key: PRNGKeyArray
    loss: Loss
    draw: Draw
    fixed: PyTree
    optimizer: optax.GradientTransformation
    max_grad_norm: float | None
    accumulate: int
    chunk: int


@dataclasses.dataclass(frozen=True)
class _Run:
    """A run between two calls of the program; `since`: chunks since the best one."""

    state: State
    best: PyTree
    best_value: float
    since: int
    history: History
    step: int

    def saved(self, key: PRNGKeyArray) -> _Saved:
        best = {
            "params": self.best,
            "value": np.float64(self.best_value),
            "since": np.int64(self.since),
        }
        return _Saved(
            self.state.params, self.state.opt_state, self.state.data, best, self.history, key
        )


class _Saved(NamedTuple):
    """What a checkpoint holds; the first field that differs is the one that is named."""

    params: PyTree
    opt_state: PyTree
    data: PyTree
    best: dict[str, Any]
    history: History
    key: PRNGKeyArray


class _Rule(NamedTuple):
    """When a run ends."""

    num_steps: int
    chunk: int
    patience: int | None
    criterion: Callable[[History], float]


def _own(leaf: Any) -> Any:
    """A copy with a type of its own: weakly typed leaves would become strong ones on their way
    through the loop.
    """
    return jnp.array(leaf, jnp.result_type(leaf)) if eqx.is_array_like(leaf) else leaf


def _check(how: Method, params: PyTree, data: PyTree) -> list[str]:
    """The names of all metrics, in order."""
    params = eqx.combine(params, how.fixed)
    batch, after = eqx.filter_eval_shape(how.draw, how.key, params, data)
    shapes = [
        [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)] for tree in (data, after)
    ]
    if shapes[0] != shapes[1] or jax.tree.structure(data) != jax.tree.structure(after):
        raise ValueError(
            f"expected draw to return data of the shapes that it was given, {shapes[0]}, got"
            f" {shapes[1]}; data is"
            " carried from step to step, so give it its final shapes and dtypes at the start"
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


def _start(how: Method, params: PyTree, data: PyTree, keep_best: bool) -> _Run:
    history = {name: np.zeros(0, np.float32) for name in _check(how, params, data)}
    state = State(params, jax.tree.map(_own, how.optimizer.init(params)), data)
    return _Run(
        state, jax.tree.map(jnp.copy, params) if keep_best else None, math.inf, 0, history, 0
    )


def _fitted(fixed: PyTree, out: _Run, stopped: str) -> Fitted:
    params = eqx.combine(out.state.params, fixed)
    best = params if out.best is None else eqx.combine(out.best, fixed)
    history = out.history | {"skipped": out.history["skipped"].astype(bool)}
    return Fitted(params, best, history, out.state.data, out.step, stopped)


def _resumed(checkpoints: Checkpoints, key: PRNGKeyArray, start: _Run, num_steps: int) -> _Run:
    """The run as the latest checkpoint has it, or as it starts."""

    def like(step: int) -> _Saved:
        rows = {name: np.zeros(step, np.float32) for name in start.history}
        return dataclasses.replace(start, history=rows).saved(key)

    found = checkpoints.load(like)
    if found is None:
        return start
    step, saved = found
    if not np.array_equal(jax.random.key_data(saved.key), jax.random.key_data(key)):
        raise ValueError(
            "expected a checkpoint of a run with the same key, got another key's; pass that, or"
            " another directory"
        )
    if step > num_steps:
        raise ValueError(
            f"expected num_steps to count the {step} steps that were made, got {num_steps}; it is"
            " the number in all"
        )
    state = State(saved.params, saved.opt_state, saved.data)
    best = saved.best
    return _Run(
        state, best["params"], float(best["value"]), int(best["since"]), saved.history, step
    )


def _train(
    how: Method, rule: _Rule, out: _Run, progress: bool, save: Callable[[_Run, bool], None]
) -> tuple[_Run, str]:
    """Go on until the rule says stop; returns the run, and why it stopped early."""
    pace = 1
    with Bar(rule.num_steps, out.step, progress) as bar, _Interrupts() as interrupts:
        stopped = _verdict(rule, out)
        while not stopped and out.step < rule.num_steps:
            start = time.perf_counter()
            # A call never crosses a look, wherever the last one ended: so the looks do not depend
            # on the pace.
            num = min(pace, rule.chunk - out.step % rule.chunk, rule.num_steps - out.step)
            state, rows = steps((how, np.int32(out.step), np.int32(num)), out.state)
            rows = {name: np.asarray(values)[:num] for name, values in rows.items()}
            history = {name: np.append(values, rows[name]) for name, values in out.history.items()}
            out = dataclasses.replace(out, state=state, history=history, step=out.step + num)
            if out.step % rule.chunk == 0:
                out = _look(rule, out)
            seconds = time.perf_counter() - start
            bar.show(out.step, rows | {"skipped": rows["skipped"].astype(bool)}, seconds)
            pace = min(2 * pace, rule.chunk) if seconds < SECONDS else max(pace // 2, 1)
            stopped = _verdict(rule, out) or ("interrupted" if interrupts.asked else "")
            save(out, out.step == rule.num_steps or bool(stopped))
    return out, "" if out.step >= rule.num_steps else stopped


def _look(rule: _Rule, out: _Run) -> _Run:
    """Compare the chunk that has just ended with the best one."""
    if rule.patience is None:
        return out
    rows = {name: values[-rule.chunk :] for name, values in out.history.items()}
    kept = rows["skipped"] == 0
    value = (
        rule.criterion({name: values[kept] for name, values in rows.items()})
        if kept.any()
        else math.inf
    )
    if value < out.best_value:
        best = jax.tree.map(jnp.copy, out.state.params)
        return dataclasses.replace(out, best=best, best_value=value, since=0)
    return dataclasses.replace(out, since=out.since + 1)


def _verdict(rule: _Rule, out: _Run) -> str:
    if rule.patience is not None and out.since >= rule.patience:
        return "patience"
    ended = out.step and out.step % rule.chunk == 0
    return "not finite" if ended and out.history["skipped"][-rule.chunk :].all() else ""


@eqx.filter_jit(donate="all-except-first")
def steps(
    what: tuple[Method, Any, Any], state: State
) -> tuple[State, dict[str, Float[Array, " chunk"]]]:
    """`num` steps from step `first` on, of a program for up to `chunk`: one compilation serves all.

    Takes (how, first, num) and the state, whose memory it uses; returns the state and every metric
    [chunk], of which the first `num` are made.
    """
    how, first, num = what
    shapes = jax.eval_shape(lambda state: step(how, state, jnp.int32(0))[1], state)
    rows = {name: jnp.zeros(how.chunk, jnp.float32) for name in shapes}

    def body(i: Array, carry: tuple) -> tuple:
        state, rows = carry
        state, metrics = step(how, state, first + i)
        return state, {name: values.at[i].set(metrics[name]) for name, values in rows.items()}

    return jax.lax.fori_loop(0, num, body, (state, rows))


def step(how: Method, state: State, t: Int[Array, ""]) -> tuple[State, dict[str, Float[Array, ""]]]:
    """Step number `t`: draws, gradients, and an update unless they are not finite; returns the
    state and metrics.
    """
    params = eqx.combine(state.params, how.fixed)

    def value_of(
        trained: PyTree, key: PRNGKeyArray, batch: PyTree
    ) -> tuple[Array, dict[str, Array]]:
        return how.loss(eqx.combine(trained, how.fixed), key, batch)

    def one(
        carry: tuple[PyTree, PyTree], key: PRNGKeyArray
    ) -> tuple[tuple[PyTree, PyTree], dict[str, Array]]:
        data, total = carry
        draw_key, loss_key = jax.random.split(key)
        batch, data = how.draw(draw_key, params, data)
        (value, metrics), grads = jax.value_and_grad(value_of, has_aux=True)(
            state.params, loss_key, batch
        )
        metrics = {"loss": value, **metrics}
        return (data, jax.tree.map(jnp.add, total, grads)), {
            k: jnp.float32(v) for k, v in metrics.items()
        }

    keys = jax.random.split(jax.random.fold_in(how.key, t), how.accumulate)
    start = (state.data, jax.tree.map(jnp.zeros_like, state.params))
    (data, total), metrics = jax.lax.scan(one, start, keys)
    grads = jax.tree.map(lambda leaf: leaf / how.accumulate, total)
    metrics = {
        name: values.sum() if name == "tokens" else values.mean()
        for name, values in metrics.items()
    }
    norm = optax.tree.norm(grads)
    if how.max_grad_norm is not None:
        clip = optax.clip_by_global_norm(how.max_grad_norm)
        grads = clip.update(grads, clip.init(grads))[0]
    updates, opt_state = how.optimizer.update(grads, state.opt_state, state.params)
    after = State(optax.apply_updates(state.params, updates), opt_state, data)
    finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
    state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), after, state)
    return state, metrics | {
        "grad_norm": norm.astype(jnp.float32),
        "skipped": (~finite).astype(jnp.float32),
    }


class _Interrupts:
    """Ctrl-C while steps run: the first is noted, so that nothing is lost, the second raises."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> _Interrupts:
        # Another handler than Python's own knows what it does, and only the main thread may set
        # one.
        mine = threading.current_thread() is threading.main_thread()
        self._set = mine and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if self._set:
            signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if self._set:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _ask(self, number: int, frame: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
