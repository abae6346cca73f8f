"""One compiled training loop for every objective: gradients, skipping, checkpoints, early stop, a
bar.

    def draw(key, params, data):    # under the current parameters, without gradient
        return batch, data          # `data` is carried: a replay buffer, a cursor

    def loss(params, key, batch):
        return value, {"elbo": elbo, "tokens": tokens}

    training = Training(params, draw, loss)
    out = fit.run(key, training, optimizer=optax.adam(1e-3), num_steps=10_000)

Step t has the key fold_in(key, t), so that a longer run keeps its prefix, and one that was stopped
goes on to the same bits.

Parts of the parameters learn at rates of their own by `optax.multi_transform`, for example log Z of
Training({"policy": weights, "log_z": jnp.float32(0)}, draw, loss):

    rates = {"policy": optax.adam(1e-3), "log_z": optax.adam(1e-1)}
    optimizer = optax.multi_transform(rates, {"policy": "policy", "log_z": "log_z"})
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PRNGKeyArray, PyTree

from ppl.checks import check_count
from ppl.showing import shown

from .checkpoints import Checkpoints
from .interrupts import Interrupts
from .progress import Bar
from .training import Method, State, Training, initial, metric_names, own, steps, trained_part

log = logging.getLogger(__name__)

History = dict[str, np.ndarray]

ZERO = "zero_rewards"
"""The metric that is the share of zero rewards among the strings that are drawn; `run` says if it
stays visible.
"""
VISIBLE = 0.05

SECONDS = 0.5
"""About how long steps run before the bar moves and an interrupt is heeded; a single step may take
longer.
"""


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
    training: Training,
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
    is counted.  After an interrupt (Ctrl-C) the result has what there was by then, saved; a second
    one raises.  Where more than a twentieth of the strings of the last chunk had reward zero, if
    the loss reports that (as `gflownet`'s does, of the guide's own), it is said at the end.

    Args:
        key: typed key.
        training: parameters, draw, loss and data; compiled once for all steps.
        optimizer: any of optax.
        num_steps: in all, those of a resumed run included.
        max_grad_norm: gradients are clipped to this global norm.
        accumulate: draws whose gradients are averaged in each step.
        chunk: steps between two looks at what `criterion` says.
        patience: stop after so many chunks without a better one, and keep the best parameters.
        criterion: chunk's history, skipped steps left out -> a number, the lower the better.
        directory: for checkpoints; a run that finds one there goes on to the bits of one never
            stopped.
        save_every: chunks from one checkpoint to the next; the last state is saved in any case.
        config: entries that a checkpoint must agree in, e.g. the learning rate; JSON.
        progress: show a bar where there is a terminal or a notebook.

    Raises:
        ValueError: if a count is not positive, `data` changes its shapes, the loss is no scalar or
            reports what is none, or the checkpoint is of another run, or of more steps.
    """
    rule = _Rule(num_steps, chunk, patience, criterion)
    _check_counts(rule, accumulate, save_every)
    trained, fixed = trained_part(training.params)
    # The program updates its state in place: the caller keeps his own.
    trained, data = jax.tree.map(own, (trained, training.data))
    draw, loss = training.draw, training.loss
    how = Method(key, draw, loss, fixed, optimizer, max_grad_norm, accumulate, chunk)
    begin = _begin(how, trained, data, patience is not None)
    if directory is None:
        return _fitted(fixed, *_train(how, rule, begin, progress, lambda out, last: None), chunk)
    settings = _settings(how, rule) | dict(config or {})
    with Checkpoints(directory, settings) as checkpoints:
        begin = _resumed(checkpoints, key, begin, num_steps)
        save = _Saving(checkpoints, key, save_every * chunk)
        return _fitted(fixed, *_train(how, rule, begin, progress, save), chunk)


class _Rule(NamedTuple):
    """When a run ends."""

    num_steps: int
    chunk: int
    patience: int | None
    criterion: Callable[[History], float]


def _check_counts(rule: _Rule, accumulate: int, save_every: int) -> None:
    check_count("num_steps", rule.num_steps)
    check_count("accumulate", accumulate)
    check_count("chunk", rule.chunk)
    check_count("save_every", save_every)
    if rule.patience is not None:
        check_count("patience", rule.patience)


def _settings(how: Method, rule: _Rule) -> dict[str, Any]:
    """What a checkpoint must agree in, besides its arrays."""
    return {
        "max_grad_norm": how.max_grad_norm,
        "accumulate": how.accumulate,
        "chunk": rule.chunk,
        "patience": rule.patience,
    }


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


@dataclasses.dataclass(frozen=True)
class _Saving:
    """Saves a run after every so many steps, and at its end."""

    checkpoints: Checkpoints
    key: PRNGKeyArray
    every: int

    def __call__(self, out: _Run, last: bool) -> None:
        if last or out.step % self.every == 0:
            self.checkpoints.save(out.step, out.saved(self.key))


def _begin(how: Method, params: PyTree, data: PyTree, keep_best: bool) -> _Run:
    state = initial(how, params, data)
    history = {name: np.zeros(0, np.float32) for name in metric_names(how, state)}
    best = jax.tree.map(jnp.copy, params) if keep_best else None
    return _Run(state, best, math.inf, 0, history, 0)


def _say_zero_rewards(history: History, chunk: int) -> None:
    if ZERO not in history or not len(last := history[ZERO][-chunk:]):
        return
    if (share := float(last.mean())) > VISIBLE:
        log.warning(
            "%.0f %% of the strings of the last %d steps had reward zero.  A guide learns from them"
            " only not to draw them, and what it spends on them is missing elsewhere: put what"
            " forbids them on the target as a potential with a look-ahead (ppl.regex, ppl.banned,"
            " ppl.must_end, ...), by which the guide's law is masked, or give them a small reward.",
            100 * share,
            len(last),
        )


def _fitted(fixed: PyTree, out: _Run, stopped: str, chunk: int) -> Fitted:
    params = eqx.combine(out.state.params, fixed)
    best = params if out.best is None else eqx.combine(out.best, fixed)
    _say_zero_rewards(out.history, chunk)
    history = out.history | {"skipped": out.history["skipped"].astype(bool)}
    return Fitted(params, best, history, out.state.data, out.step, stopped)


def _resumed(checkpoints: Checkpoints, key: PRNGKeyArray, begin: _Run, num_steps: int) -> _Run:
    """The run as the latest checkpoint has it, or as it starts."""

    def like(step: int) -> _Saved:
        rows = {name: np.zeros(step, np.float32) for name in begin.history}
        return dataclasses.replace(begin, history=rows).saved(key)

    found = checkpoints.load(like)
    if found is None:
        return begin
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
    with Bar(rule.num_steps, out.step, progress) as bar, Interrupts() as interrupts:
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
