"""How a diffusion sampler is trained: by balance on paths from anywhere, or by the reverse KL on
its own.

    training = learning.training(key, log_density, Bridge(2, variance=80.0), objective=learning.tb)
    faster = learning.optimizer(policy=optax.adam(1e-3), log_z=optax.adam(1e-1))
    out = fit.run(key, training, optimizer=faster, num_steps=5000)
    found = sampling.run(key, learning.sampler(training, out), num_particles=2000)

| objective | of | paths |
| --- | --- | --- |
| `tb`, `vargrad` | whole paths, log Z a parameter or the batch's own | any |
| `subtb` | all stretches, flows forward-looking | any |
| `reverse_kl` | PIS and DDS: E[log q - log R] by reparametrisation | its own |

With a `search`, every other step takes paths back from points that were found: by the sampler, and
by Langevin moves that start there (arXiv 2402.05098).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import blackjax
import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from ppl.checks import check_count, check_counts, check_function
from ppl.pytrees import as_pytree
from ppl.showing import shown

from ..fit import Fitted
from ..objectives import balance
from ..objectives.balance import Scalar, Trajectories
from ..training import Training
from . import paths
from .policy import LogDensity, Policy
from .processes import Process
from .sampling import Sampler

Params = dict[str, Any]
"""{"policy": Policy, "log_z": []}."""

Flows = Callable[[], Float[Array, "N M"]]
"""The log-flows of the states of the paths; computed if it is called."""

Objective = Callable[[Params, Trajectories, Flows], Float[Array, ""]]
"""(params, paths, their flows) -> loss."""


class Setting(eqx.Module):
    """What is not trained: the process, and log R."""

    process: Process
    log_density: LogDensity

    def evaluate(self, params: Params, states: Float[Array, "N M D"]) -> Trajectories:
        """Paths as they are under the current policy."""
        return paths.evaluate(self.process, params["policy"], self.log_density, states)

    def flows(self, params: Params, states: Float[Array, "N M D"]) -> Float[Array, "N M"]:
        """log Z of the start, and the log-flows of all others."""
        later = paths.log_flows(self.process, params["policy"], self.log_density, states)
        first = jnp.broadcast_to(params["log_z"], (len(states), 1))
        return jnp.concatenate([first, later], axis=1)


# Objectives.


def tb(params: Params, x: Trajectories, flows: Flows) -> Float[Array, ""]:
    """Trajectory balance with a learned log Z."""
    return balance.tb(x, params["log_z"])


def vargrad(params: Params, x: Trajectories, flows: Flows) -> Float[Array, ""]:
    """Half the variance of log w."""
    return balance.vargrad(x)


def subtb(params: Params, x: Trajectories, flows: Flows) -> Float[Array, ""]:
    """Sub-trajectory balance over all stretches alike."""
    return balance.subtb(x, flows(), 1)


class Loss(eqx.Module):
    """An objective on the paths that were drawn."""

    setting: Setting
    objective: Objective = eqx.field(static=True)

    def __call__(
        self, params: Params, key: PRNGKeyArray, states: Array
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        del key
        x = self.setting.evaluate(params, states)
        value = self.objective(params, x, lambda: self.setting.flows(params, states))
        return value, {"mean_log_weight": paths.log_weights(x).mean()}


class ReverseKL(eqx.Module):
    """-E log w / D on paths of its own, whose noise is the loss's: PIS (2111.15141), DDS."""

    setting: Setting
    num: int = eqx.field(static=True)

    def __call__(
        self, params: Params, key: PRNGKeyArray, batch: None
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        process, log_density = self.setting.process, self.setting.log_density
        states = paths.rollout(key, process, params["policy"], log_density, self.num)
        log_w = paths.log_weights(self.setting.evaluate(params, states))
        return -log_w.mean() / process.dim, {"mean_log_weight": log_w.mean()}


def optimizer(
    *, policy: optax.GradientTransformation, log_z: optax.GradientTransformation
) -> optax.GradientTransformation:
    """One for the drift and one for log Z, which may learn faster."""
    each: dict[Hashable, optax.GradientTransformation] = {"policy": policy, "log_z": log_z}
    return optax.multi_transform(each, {"policy": "policy", "log_z": "log_z"})


# Where paths come from.


@shown
class Search(NamedTuple):
    """Local search (2402.05098): every `every` steps `num_steps` Langevin moves (MALA) of
    `num_chains` chains, that begin at points of the buffer; what they visit after half of them goes
    into a buffer of its own, and every other step learns from paths back from there.

    size: points in a buffer.  step_size: of the moves at first; a hundredth more or less after each
    sweep, towards an acceptance of 0.574.
    """

    every: int = 100
    num_steps: int = 200
    num_chains: int = 64
    size: int = 10_000
    step_size: float = 0.01


@shown
class Buffer(NamedTuple):
    """B points and their log R; -inf where there is none yet."""

    x: Float[Array, "B D"]
    log_r: Float[Array, " B"]

    def add(self, x: Float[Array, "N D"], log_r: Float[Array, " N"]) -> Buffer:
        """The newest in the place of the oldest, which are first."""
        joined = jax.tree.map(lambda old, new: jnp.concatenate([old, new]), self, Buffer(x, log_r))
        return jax.tree.map(lambda leaf: leaf[-len(self.log_r) :], joined)

    def take(self, key: PRNGKeyArray, num: int) -> Float[Array, "N D"]:
        """`num` of them with weight 1 / (0.01 B + rank of log R)."""
        size = len(self.log_r)
        rank = jnp.zeros(size).at[jnp.argsort(-self.log_r)].set(jnp.arange(size, dtype=jnp.float32))
        log_weight = jnp.where(self.log_r > -jnp.inf, -jnp.log(0.01 * size + rank), -jnp.inf)
        return self.x[jax.random.categorical(key, log_weight, shape=(num,))]


@shown
class Data(NamedTuple):
    """What is carried from step to step."""

    step: Int[Array, ""]
    drawn: Buffer | None
    searched: Buffer | None
    step_size: Float[Array, ""]


class Draw(eqx.Module):
    """Paths ahead, explored; with a search in every other step back from what was found."""

    setting: Setting
    explore: Callable[[Int[Array, ""]], Scalar]
    num: int = eqx.field(static=True)
    search: Search | None = eqx.field(static=True)

    def __call__(self, key: PRNGKeyArray, params: Params, data: Data) -> tuple[Array, Data]:
        first, second, third = jax.random.split(key, 3)
        process, log_density = self.setting.process, self.setting.log_density

        def ahead(data: Data) -> tuple[Array, Data]:
            how = process, params["policy"], log_density
            states = paths.rollout(first, *how, self.num, self.explore(data.step))
            if data.drawn is not None:
                x = states[:, -1]
                data = data._replace(drawn=data.drawn.add(x, jax.vmap(log_density)(x)))
            return states, data

        def back(data: Data) -> tuple[Array, Data]:
            assert data.searched is not None
            x = data.searched.take(second, self.num)
            return paths.backward(first, process, x), data

        if self.search is None:
            states, data = ahead(data)
        else:
            data = self._searched(third, data, self.search)
            states, data = jax.lax.cond(data.step % 2 == 1, back, ahead, data)
        return states, data._replace(step=data.step + 1)

    def _searched(self, key: PRNGKeyArray, data: Data, search: Search) -> Data:
        """A sweep of Langevin moves when one is due: the first before the first path back."""

        def sweep(data: Data) -> Data:
            assert data.drawn is not None and data.searched is not None
            start, moves = jax.random.split(key)
            x = data.drawn.take(start, search.num_chains)
            x, log_r, accepted = langevin(
                moves, self.setting.log_density, x, data.step_size, search.num_steps
            )
            factor = jnp.where(accepted > 0.574, 1.01, 1 / 1.01)
            return data._replace(
                searched=data.searched.add(x, log_r), step_size=data.step_size * factor
            )

        return jax.lax.cond(data.step % search.every == 1, sweep, lambda data: data, data)


def langevin(
    key: PRNGKeyArray,
    log_density: LogDensity,
    x: Float[Array, "N D"],
    step_size: Float[Array, ""],
    num_steps: int,
) -> tuple[Float[Array, "M D"], Float[Array, " M"], Float[Array, ""]]:
    """MALA from every point: the states of the second half of `num_steps`, their log R, and the
    mean acceptance.
    """
    kernel = blackjax.mala.build_kernel()
    state = jax.vmap(lambda x: blackjax.mala.init(x, log_density))(x)

    def step(state: Any, key: Array) -> tuple[Any, Any]:
        keys = jax.random.split(key, len(x))
        state, info = jax.vmap(lambda key, s: kernel(key, s, log_density, step_size))(keys, state)
        return state, (state.position, state.logdensity, info.acceptance_rate)

    _, (positions, log_r, rate) = jax.lax.scan(step, state, jax.random.split(key, num_steps))
    half = num_steps // 2
    flat = jax.tree.map(lambda leaf: leaf[half:].reshape(-1, *leaf.shape[2:]), (positions, log_r))
    return *flat, rate.mean()


# The training runs.


def training(
    key: PRNGKeyArray,
    log_density: LogDensity,
    process: Process,
    *,
    policy: Policy | None = None,
    objective: Objective = tb,
    explore: Callable[[Int[Array, ""]], Scalar] | float = 0.0,
    search: Search | None = None,
    batch_size: int = 300,
) -> Training:
    """What `fit.run` minimises: balance on paths whose drawing no gradient passes through.

    Args:
        key: typed key.
        log_density: log R of one point [D]; -inf is a density of zero.
        process: `Bridge` or `OrnsteinUhlenbeck`.
        policy: as it starts; by default `Policy(key, D)`, as large as the process's noise.
        objective: `tb`, `vargrad`, `subtb`, or any other.
        explore: standard deviation that is added to every step, or step -> one.
        search: `Search()`, for energies with many modes.
        batch_size: paths to a step.

    Raises:
        ValueError: if log R is no number [] of a point [D], `process` is none, or a count is below
            1.
    """
    check_count("batch_size", batch_size)
    setting = _setting(log_density, process)
    schedule = explore if callable(explore) else lambda step: jnp.float32(explore)
    return Training(
        params=_params(key, process, policy),
        draw=Draw(setting, as_pytree(schedule), batch_size, search),
        loss=Loss(setting, objective),
        data=_data(process, search),
    )


def sampler(training: Training, out: Fitted) -> Sampler:
    """What was learned, as a sampler."""
    setting = training.loss.setting
    return Sampler(setting.process, out.best["policy"], setting.log_density)


def reverse_kl(
    key: PRNGKeyArray,
    log_density: LogDensity,
    process: Process,
    *,
    policy: Policy | None = None,
    batch_size: int = 300,
) -> Training:
    """What `fit.run` minimises for PIS and DDS; arguments and errors as in `training`."""
    check_count("batch_size", batch_size)
    setting = _setting(log_density, process)
    return Training(
        params=_params(key, process, policy),
        draw=_nothing,
        loss=ReverseKL(setting, batch_size),
    )


def _nothing(key: PRNGKeyArray, params: Params, data: Any) -> tuple[None, Any]:
    """Its paths are drawn where gradients pass."""
    return None, data


def _setting(log_density: LogDensity, process: Process) -> Setting:
    if not isinstance(process, Process):
        raise ValueError(
            f"expected a process, got {type(process).__name__}; pass processes.Bridge(dim)"
        )
    check_function("log_density", log_density, "(x)", "jax.numpy.sum")
    found = jax.eval_shape(log_density, jax.ShapeDtypeStruct((process.dim,), jnp.float32))
    shape = getattr(found, "shape", None)
    if shape != ():
        got = type(found).__name__ if shape is None else f"shape {list(shape)}"
        raise ValueError(
            f"expected log_density to give one number for a point [{process.dim}], got {got}; sum"
            " over the coordinates"
        )
    return Setting(process, as_pytree(log_density))


def _params(key: PRNGKeyArray, process: Process, policy: Policy | None) -> Params:
    if policy is None:
        _, variance = process.ahead(0)
        size = float(jnp.sqrt(variance * process.num_steps))
        policy = Policy(key, process.dim, size=max(size, 1e-3))
    return {"policy": policy, "log_z": jnp.float32(0)}


def _data(process: Process, search: Search | None) -> Data:
    if search is None:
        return Data(jnp.int32(0), None, None, jnp.float32(0))
    check_counts(
        every=search.every,
        num_steps=search.num_steps,
        num_chains=search.num_chains,
        size=search.size,
    )
    empty = Buffer(jnp.zeros((search.size, process.dim)), jnp.full(search.size, -jnp.inf))
    return Data(jnp.int32(0), empty, empty, jnp.float32(search.step_size))
