"""Running the chains of any kernel: for as long as wanted, keeping what is asked for, going on
where a run stopped.

    kernel = suffix.kernel(p**4)
    out = chains.run(key, kernel, x, num_samples=1000, thin=5)
    out.draws["log_prob"]                                                     # [1000, C]
    out = chains.run(key, kernel, x, num_samples=2000, thin=5, resume=out)  # a thousand more

Step i of a run has the key fold_in(key, i).  So a longer run keeps its prefix, a run that was
stopped and goes on draws what it would have drawn, and how many steps are compiled and run at a
time changes nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PRNGKeyArray

from ppl.checks import check_count
from ppl.failures import interruptible
from ppl.pytrees import register_dataclass
from ppl.rows import PROMPTS
from ppl.sequences import Sequences
from ppl.showing import shown

from ..base import Cost, Kernel
from ..calling import watched
from ..results import Chains
from ..strings.prompts import Stacked, stack

SECONDS = 0.5
"""About how long chains run before `watch` is called and an interrupt is heeded; a single draw may
take longer.
"""
CHUNK_BYTES, CHUNK_DRAWS = 16 * 2**20, 1024
"""What a device holds at most before it is taken to the host."""
PLACES = ("sequences", "position", "theta")
COLLECTED = (*PLACES, "latents", "log_prob", "log_z", "rung", "logdensity")


Collect = Callable[[Any], dict[str, Any]]
Record = Callable[[Any], Any]
Watch = Callable[[Chains, int], None]


def collected(state: Any) -> dict[str, Any]:
    """The strings or positions of chains, and what the state has of log p, log Z-hat, log density,
    rungs, and latents by the names of their sites.

    Raises:
        ValueError: if the state has neither strings, positions nor theta.
    """
    if isinstance(state, Sequences):
        return {"sequences": state}
    found = {name: getattr(state, name) for name in COLLECTED if hasattr(state, name)}
    if not found.keys() & {*PLACES}:
        raise ValueError(
            f"expected a chain state with `sequences` or `position`, got {type(state).__name__};"
            " say what to keep of it, e.g. collect=lambda state: {'x': state}"
        )
    return found


def positions(state: Any) -> Any:
    """The strings or positions of chains, from which a kernel's `init` makes a state."""
    found = collected(state)
    return next(found[name] for name in PLACES if name in found)


def small_parts(infos: Any, num_chains: int) -> Any:
    """What steps report of each chain, up to 32 numbers; what is larger is None, and so are costs,
    which are added up.

    `infos` has leaves [steps, C, ...], and so has the result.
    """

    def part(leaf: Any) -> Any:
        return (
            None if isinstance(leaf, Cost) or leaf.size > 32 * num_chains * leaf.shape[0] else leaf
        )

    return jax.tree.map(part, infos, is_leaf=_is_cost)


def _is_cost(x: Any) -> bool:
    return isinstance(x, Cost)


def ignore(result: Chains, total: int) -> None:
    """A `watch` that does nothing."""


def run(
    key: PRNGKeyArray,
    kernel: Kernel | Sequence[Kernel],
    x: Any,
    *,
    num_samples: int,
    thin: int = 1,
    warmup: int = 0,
    collect: Collect = collected,
    record: Record | None = None,
    watch: Watch = ignore,
    resume: Chains | None = None,
) -> Chains:
    """Run the chains of a kernel, and keep every `thin`-th state.

    The steps are compiled once for all kernels of the same kind and shapes (other weights, another
    prompt of the same bucket), whatever the numbers of samples: a kernel is an argument of the
    program.  That is so for all of this library; a kernel of your own made of closures is compiled
    for itself, and what it closes over are constants of the program (`base.holding` helps).

    Args:
        key: typed key.
        kernel: any, with a step that can be traced.  Or a list of P of one kind (of one prompt
            each), whose chains run side by side in one batch, kernel i with key i of split(key, P):
            as alone.  Then all leaves of the result have P first (`prompts.apart` takes them
            apart).
        x: C initial positions, for `kernel.init`; of a list, a list of them.
        num_samples: S, draws in all, those of `resume` included.
        thin: steps from one draw to the next.
        warmup: steps before those, of which nothing is kept (`samplers.mcmc.warmup` adapts a
            kernel).
        collect: what to keep of a state, as a dictionary; traced, and static: another function,
            a lambda written anew too, is another program.
        record: what to keep of the info of the `thin` steps that made a draw, leaves [thin, C,
            ...]; traced and static alike.  By default `small_parts`.
        watch: called every half second or so, and at the end, with the result so far and the number
            of steps in all: for a bar, or to save (`samplers.mcmc.checkpoints`).
        resume: a run with the same key, kernel, thin and warmup, to go on with in place of `x`.

    Returns:
        `Chains`: draws and info on the host, the state on the device; `init` is not in the cost.
        After an interrupt (Ctrl-C) it has what there was by then, flagged.

    Raises:
        ValueError: if a count is not positive, if `resume` is of another run or has more than
            `num_samples` draws, or as `kernel.init` and `collect` do.
    """
    _check_counts(num_samples, thin, warmup)
    step, init = started(kernel)
    key = jax.random.split(key, step.num) if isinstance(step, SideBySide) else key
    if resume is None:
        nothing: dict[str, Any] = {"draws": {}, "info": None, "cost": None, "steps": 0}
        resume = Chains(state=init(x), key=key, thin=thin, warmup=warmup, **nothing)
    _check_resumed(resume, key, num_samples, thin, warmup)
    keep = Keep(collect, record, thin)
    return watched(_going_on, kernel, key, step, resume, num_samples, keep, watch)


def started(kernel: Kernel | Sequence[Kernel]) -> tuple[Any, Callable[[Any], Any]]:
    """The step of a kernel and its `init`; of several, a `SideBySide`, and what starts all."""
    if isinstance(kernel, Kernel):
        return kernel.step, kernel.init
    steps = SideBySide(stack([one.step for one in kernel], "kernels"), len(kernel))

    def init(x: Any) -> Any:
        if len(x) != len(kernel):
            raise ValueError(
                f"expected initial positions for each of {len(kernel)} kernels, got {len(x)}; pass"
                " a list with those of every kernel"
            )
        states = [one.init(own) for one, own in zip(kernel, x, strict=True)]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)

    return steps, init


def _going_on(
    key: Any, step: Any, resume: Chains, num_samples: int, keep: Keep, watch: Watch
) -> Chains:
    """`resume` with as many draws as there are to be, or an interrupt lets it have."""
    # Weakly typed leaves would become strong ones on their way through the loop, or a file, and
    # compile anew.
    state = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.asarray(leaf).dtype), resume.state)
    row = kept(step, state, key, keep)
    size = _capacity(row)
    program = functools.partial(_draws, key, step, keep=keep, size=size)
    rows = _host_rows(resume, draws_of(row[:2], key, num_samples))
    out = _with_draws(dataclasses.replace(resume, state=state, interrupted=False), rows)
    total, chunk = resume.warmup + num_samples * resume.thin, 1
    try:
        while out.steps < total:
            start = time.perf_counter()
            out = _advance(out, program, rows, total, chunk)
            watch(out, total)
            quick = time.perf_counter() - start < SECONDS
            chunk = min(2 * chunk, size) if quick else max(chunk // 2, 1)
    except KeyboardInterrupt:
        out = dataclasses.replace(out, interrupted=out.steps < total)
    return out


def _check_counts(num_samples: int, thin: int, warmup: int) -> None:
    check_count("num_samples", num_samples)
    check_count("thin", thin)
    if warmup < 0:
        raise ValueError(
            f"expected warmup to be at least 0 steps, got {warmup}; pass e.g. warmup=100"
        )


def _check_resumed(resume: Chains, key: Any, num_samples: int, thin: int, warmup: int) -> None:
    same = resume.key is not None and np.array_equal(
        jax.random.key_data(resume.key), jax.random.key_data(key)
    )
    if not same or (resume.thin, resume.warmup) != (thin, warmup):
        raise ValueError(
            "expected to go on with a run of the same key, thin and warmup, got one with"
            f" thin={resume.thin}, warmup={resume.warmup} and {'the same' if same else 'another'}"
            " key; pass those, or start a new run from chains.positions(result.state)"
        )
    if resume.num_samples > num_samples:
        raise ValueError(
            f"expected num_samples to count the {resume.num_samples} draws that there are, got"
            f" {num_samples}; it is the number of draws in all"
        )


def draws_of(row: Any, key: Any, num: int) -> Any:
    """Shapes of `num` draws and their info, of shapes of one; draws come after prompts."""
    lead = key.ndim
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            (*leaf.shape[:lead], num, *leaf.shape[lead:]), leaf.dtype
        ),
        row,
    )


def _of(key: Any, draws: slice) -> tuple[slice, ...]:
    """The index of draws, which come after prompts."""
    return (*[slice(None)] * key.ndim, draws)


def _host_rows(resume: Chains, shapes_of: Any) -> Any:
    """Room for all draws and their info, with those of `resume` in it."""
    rows = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), shapes_of)
    if resume.num_samples:
        done = _of(resume.key, slice(resume.num_samples))
        (old, old_tree), (new, tree) = map(jax.tree.flatten, ((resume.draws, resume.info), rows))
        shapes = [(leaf.shape, leaf.dtype) for leaf in old]
        if old_tree != tree or shapes != [(leaf[done].shape, leaf.dtype) for leaf in new]:
            raise ValueError(
                "expected to go on with a run of the same kernel, collect and record, got one with"
                f" draws of {list(resume.draws)} and shapes {shapes}; pass what that run was given"
            )
        for room, known in zip(new, old, strict=True):
            room[done] = known
    return rows


def _advance(out: Chains, program: Callable[..., Any], rows: Any, total: int, chunk: int) -> Chains:
    """The run after some more draws, or some more of its warm-up."""
    warming = out.steps < out.warmup
    left = (out.warmup if warming else total) - out.steps
    # A warm-up need not be a whole number of draws.
    each = min(out.thin, left)
    num = min(chunk, left // each)
    with interruptible():
        state, kept = program(out.state, np.asarray([out.steps, num, each], np.int32))
        draws, info, costs = jax.device_get(kept)
    if not warming:
        done = _of(out.key, slice(out.num_samples, out.num_samples + num))
        new = _of(out.key, slice(num))
        for room, leaf in zip(jax.tree.leaves(rows), jax.tree.leaves((draws, info)), strict=True):
            room[done] = leaf[new]
    spent = jax.tree.map(lambda cost: cost[..., :num].sum(-1, dtype=np.int64), costs)
    cost = spent if out.cost is None else jax.tree.map(np.add, out.cost, spent)
    # In one piece: an interrupt finds the run either before or after.
    return _with_draws(
        dataclasses.replace(out, state=state, cost=cost, steps=out.steps + num * each), rows
    )


def _with_draws(out: Chains, rows: Any) -> Chains:
    """`out` with the rows that are filled; what is in them stays as it is."""
    done = _of(out.key, slice(out.num_samples))
    draws, info = jax.tree.map(lambda leaf: leaf[done], rows)
    return dataclasses.replace(out, draws=draws, info=info)


# What is compiled: ordinary jits, of which a kernel's step is an argument.


@shown
@dataclasses.dataclass(frozen=True)
class Keep:
    """(state, infos of the steps of a draw) -> (draw, info, cost), what is kept of them."""

    collect: Collect
    record: Record | None
    thin: int

    def __call__(self, state: Any, infos: Any) -> tuple[dict[str, Any], Any, Cost | None]:
        num_chains = jax.tree.leaves(state)[0].shape[0]
        info = small_parts(infos, num_chains) if self.record is None else self.record(infos)
        return self.collect(state), info, total_cost(infos)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class SideBySide:
    """The steps of P kernels, stacked, for programs of one step and keys [P]."""

    steps: Stacked
    num: int = dataclasses.field(metadata={"static": True})

    def __call__(self, program: Callable[..., Any], keys: Any, state: Any, *same: Any) -> Any:
        """program(key, step, state, *same) of each, mapped together; results have P first."""

        def alone(key: Any, varying: list, state: Any) -> Any:
            return program(key, self.steps.one(varying), state, *same)

        return jax.vmap(alone, axis_name=PROMPTS)(keys, self.steps.varying, state)


@functools.partial(jax.jit, static_argnames=("keep", "size"))
def _draws(
    key: Any, step: Any, state: Any, counts: Int[Array, "3"], *, keep: Keep, size: int
) -> tuple[Any, Any]:
    """(first, num, each) = counts: `num` draws of `each` steps from step `first` on.

    Returns the state, and (draws, info, cost), leaves [size, ...] of which the first `num` are
    filled.
    """
    if isinstance(step, SideBySide):
        return step(functools.partial(_draws, keep=keep, size=size), key, state, counts)
    first, num, each = counts
    infos, row = jax.eval_shape(_one_draw, key, step, state, keep=keep)
    rows = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((size, *leaf.shape), leaf.dtype), row)

    def one_step(i: Array, carry: tuple) -> tuple:
        state, infos, start = carry
        state, info = step(jax.random.fold_in(key, i), state)
        return state, _put(infos, i - start, info), start

    def draw(j: Array, carry: tuple) -> tuple:
        start = first + j * each
        # Steps that a short draw lacks cost nothing.
        state, infos_of, _ = jax.lax.fori_loop(
            start, start + each, one_step, (carry[0], _zeros(infos), start)
        )
        return state, _put(carry[1], j, keep(state, infos_of))

    return jax.lax.fori_loop(jnp.int32(0), num, draw, (state, _zeros(rows)))


@functools.partial(jax.jit, static_argnames="keep")
def _one_draw(key: Any, step: Any, state: Any, *, keep: Keep) -> tuple[Any, Any]:
    """The infos of the steps of a draw, and what is kept of a draw: asked for its shapes only."""
    if isinstance(step, SideBySide):
        return step(functools.partial(_one_draw, keep=keep), key, state)
    infos = jax.lax.map(lambda own: step(own, state)[1], jax.random.split(key, keep.thin))
    return infos, keep(state, infos)


def kept(step: Any, state: Any, key: Any, keep: Keep) -> Any:
    """Shapes of what is kept of a draw: (draw, info, cost)."""
    return jax.eval_shape(_one_draw, key, step, state, keep=keep)[1]


def _capacity(row: Any) -> int:
    """How many draws of the shapes `row` a device holds at most."""
    num_bytes = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(row))
    return min(max(CHUNK_BYTES // max(num_bytes, 1), 1), CHUNK_DRAWS)


def total_cost(infos: Any) -> Cost | None:
    """The sum of all costs in the infos of some steps; a kernel made of several has the infos of
    its parts in its own.

    None if there is none.
    """
    costs = [
        jax.tree.map(lambda count: count.sum(dtype=count.dtype), part)
        for part in jax.tree.leaves(infos, is_leaf=_is_cost)
        if _is_cost(part)
    ]
    return functools.reduce(operator.add, costs) if costs else None


def _zeros(shapes: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


def _put(rows: Any, index: Any, row: Any) -> Any:
    return jax.tree.map(lambda all, one: all.at[index].set(one), rows, row)
