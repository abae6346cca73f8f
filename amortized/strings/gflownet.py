"""GFlowNet fine-tuning: a guide becomes a sampler of many targets at once (arXiv 2310.04363).

    task = gflownet.Task(base, examples, target, law)       # a prompt, an answer, ... per example
    training = gflownet.training(g, task, num=8, objective=gflownet.vargrad, slots=16)
    out = fit.run(key, training, optimizer=..., num_steps=500)
    trained = dataclasses.replace(g, params=out.best["guide"])

A step takes one example, draws strings as a behaviour says, scores them under the current guide and
balances them against log gamma.  What is learned is again a language model, so it can be a
proposal, and the answer exact.

No objective sees what share of itself a guide spends on strings of density zero, so the guide's law
is masked by what the target's look-ahead forbids (`Task.law`), and other strings of density zero
count as if they had a share of e^-10 of the posterior (`balance.floored`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from models import lora
from ppl.checks import check_count
from ppl.constraints import support
from ppl.lm import LM
from ppl.pytrees import register_dataclass
from ppl.sequences import Sequences
from ppl.showing import shown
from ppl.target import Target
from samplers.diagnostics import normalise

from .. import fit
from ..objectives import balance
from ..objectives.balance import Trajectories
from ..training import Training
from . import behaviours, replay, rollouts
from .behaviours import Behaviour
from .guide import Guide
from .prefix_rewards import Rewards, at_every_prefix
from .replay import Replay

Params = dict[str, PyTree]
"""{"guide": the guide's parameters, "log_z": [P], one for every example}."""

Objective = Callable[[Params, Trajectories, Int[Array, ""]], Float[Array, ""]]
"""(params, strings as trajectories, the example's number) -> loss."""


def vargrad(params: Params, x: Trajectories, example: Int[Array, ""]) -> Float[Array, ""]:
    """The variance of log q - log R; log Z is the batch's own."""
    return balance.vargrad(x)


def tb(params: Params, x: Trajectories, example: Int[Array, ""]) -> Float[Array, ""]:
    """Trajectory balance with a log Z for each example."""
    return balance.tb(x, params["log_z"][example])


def modified_subtb(params: Params, x: Trajectories, example: Int[Array, ""]) -> Float[Array, ""]:
    """All stretches between two prefixes; log Z is where the root stops, or the batch's own if it
    cannot.
    """
    cannot = ((x.length > 0) & jnp.isneginf(x.log_reward[:, 0])).any()
    return balance.modified_subtb(x, log_z=jnp.where(cannot, balance.log_z(x), jnp.nan))


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Task:
    """P examples of one kind of target over one frozen model.

    lm: the model p of the targets.  examples: arrays with the example first.  target_of(lm,
    example) and law_of(guide's lm, example): module-level functions that make, inside jit, an
    example's gamma and the guide's law q over the same strings; the two may have different prompts.
    """

    lm: LM
    examples: PyTree
    target_of: Callable[[LM, PyTree], Target] = dataclasses.field(metadata={"static": True})
    law_of: Callable[[LM, PyTree], Target] = dataclasses.field(metadata={"static": True})

    @property
    def num(self) -> int:
        """P."""
        return jax.tree.leaves(self.examples)[0].shape[0]

    def target(self, index: int | Int[Array, ""]) -> Target:
        """gamma of an example."""
        return self.target_of(self.lm, self._example(index))

    def law(self, lm: LM, index: int | Int[Array, ""]) -> Target:
        """The law q of a guide for an example, which draws nothing that the target's look-ahead
        forbids.
        """
        target, q = self.target(index), self.law_of(lm, self._example(index))
        target.space.check_same(q.space, "a guide's law")
        return q * support(target)

    def _example(self, index: int | Int[Array, ""]) -> PyTree:
        return jax.tree.map(lambda leaf: leaf[index], self.examples)


@shown
class Data(NamedTuple):
    """What is carried from step to step: the replay buffer, if there is one, and the number of
    steps.
    """

    replay: Replay | None
    step: Int[Array, ""]


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """N strings of one example; log_reward [N, T + 1] is untempered, `temperature` [] is the
    reward's.

    log_prior [N]: log p of strings whose reward is zero; -inf where no string's is.  log_behaviour
    [N]: as in `rollouts.Rollout`.  weight [N]: how much a string counts; None: all alike.
    """

    example: Int[Array, ""]
    sequences: Sequences
    log_reward: Float[Array, "N L"]
    temperature: Float[Array, ""]
    tokens: Int[Array, ""]
    log_prior: Float[Array, " N"]
    log_behaviour: Float[Array, " N"]
    weight: Float[Array, " N"] | None = None


def on_policy(key: PRNGKeyArray, num: int) -> Behaviour:
    """The guide as it is."""
    return behaviours.drawn(num)


def explore(key: PRNGKeyArray, num: int) -> Behaviour:
    """Two thirds of the rows at temperatures from 0.5 to 2, as in arXiv 2310.04363."""
    return behaviours.varied(key, num, low=0.5, high=2.0, share=2 / 3)


def training(
    guide: Guide,
    task: Task,
    *,
    num: int = 8,
    objective: Objective = vargrad,
    behaviour: Callable[[PRNGKeyArray, int], Behaviour] = explore,
    rewards: Rewards = at_every_prefix,
    replayed: float = 0.25,
    temperature: Callable[[Int[Array, ""]], Any] | None = None,
    dropout: float = 0.0,
    slots: int = 0,
) -> Training:
    """What `fit.run` takes: `Params`, `Draw`, `Loss` and `Data`.

    Args:
        guide: what is trained, as it starts.
        task: the examples, one of which each step takes.
        num: N, strings per step.
        objective: `vargrad`, `tb`, `modified_subtb`, or any other.
        behaviour: (key, N) -> how strings are drawn.
        rewards: which prefixes' rewards the objective needs; `prefix_rewards.at_the_end` for
            `vargrad` and `tb`.
        replayed: share of rows that are replayed, where the buffer has strings of the example.
        temperature: step -> temperature of the reward, an optax schedule: R^(1 / temperature); 1 by
            default.
        dropout: of a LoRA guide, while its strings are scored; its key is the loss's.
        slots: of the replay buffer, for each example; 0: there is none.

    Raises:
        ValueError: if num < 2 (nothing to compare a string with), or a share is outside [0, 1].
    """
    check_count("num", num)
    if num < 2 or not 0 <= replayed <= 1:
        raise ValueError(
            f"expected num of at least 2 and replayed in [0, 1], got {num} and {replayed}"
        )
    return Training(
        params={"guide": guide.params, "log_z": jnp.zeros(task.num, jnp.float32)},
        draw=Draw(guide, task, num, behaviour, rewards, replayed, temperature),
        loss=Loss(guide, task, objective, dropout),
        data=Data(_buffer(task, slots), jnp.int32(0)),
    )


def _buffer(task: Task, slots: int) -> Replay | None:
    if not slots:
        return None
    # Only the horizon is needed, so nothing is computed.
    horizon = jax.eval_shape(lambda task: task.target(0), task).max_tokens
    return replay.empty(task.num, slots, horizon)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Draw:
    """Strings of a random example and their rewards (see `training`); new ones go to the replay
    buffer.
    """

    guide: Guide
    task: Task
    num: int = dataclasses.field(metadata={"static": True})
    behaviour: Callable[[PRNGKeyArray, int], Behaviour] = dataclasses.field(
        metadata={"static": True}
    )
    rewards: Rewards = dataclasses.field(metadata={"static": True})
    replayed: float = dataclasses.field(metadata={"static": True})
    temperature: Callable[[Int[Array, ""]], Any] | None = dataclasses.field(
        metadata={"static": True}
    )

    def __call__(self, key: PRNGKeyArray, params: Params, data: Data) -> tuple[Batch, Data]:
        which_key, how_key, replay_key, roll_key = jax.random.split(key, 4)
        example = jax.random.randint(which_key, (), 0, self.task.num, jnp.int32)
        target, q = self.task.target(example), self.task.law(_lm(self.guide, params), example)
        how = self.behaviour(how_key, self.num)
        prompts = jnp.full(self.num, example, jnp.int32)
        if data.replay is not None:
            old = replay.sample(replay_key, data.replay, prompts, q.lm.eos)
            how = behaviours.given(
                how,
                old.sequences,
                old.found & (jnp.arange(self.num) < self.replayed * self.num),
            )
        out = rollouts.roll(roll_key, q, target, how, rewards=self.rewards)
        buffer = data.replay
        if buffer is not None:
            buffer = replay.add(buffer, out.sequences, out.log_reward, prompts)
        temperature = 1.0 if self.temperature is None else self.temperature(data.step)
        batch = Batch(
            example=example,
            sequences=out.sequences,
            log_reward=out.log_reward,
            temperature=jnp.asarray(temperature, jnp.float32),
            tokens=out.cost.tokens,
            log_prior=_log_prior(target, out.batch),
            log_behaviour=out.log_behaviour,
        )
        return batch, Data(buffer, data.step + 1)


def _log_prior(target: Target, x: rollouts.Batch) -> Float[Array, " N"]:
    """log p of the strings, if the reward of some is zero: a pass of the model that is made only
    then.
    """
    plain = Target(target.lm, target.prefix, target.max_tokens)
    length = x.sequences.length
    dead = jnp.isneginf(jnp.take_along_axis(x.log_reward, length[:, None], axis=1)[:, 0])
    return jax.lax.cond(
        dead.any(),
        lambda: plain.log_density(x.sequences.tokens, length),
        lambda: jnp.full(length.shape, -jnp.inf, jnp.float32),
    )


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Loss:
    """The objective on strings scored under the current guide, never under what drew them (see
    `training`).
    """

    guide: Guide
    task: Task
    objective: Objective = dataclasses.field(metadata={"static": True})
    dropout: float = dataclasses.field(metadata={"static": True})

    def __call__(
        self, params: Params, key: PRNGKeyArray, batch: Batch
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""] | Int[Array, ""]]]:
        lm, x = _lm(self.guide, params), batch.sequences
        if self.dropout:
            lm = lora.with_dropout(key, lm, self.dropout)
        s = rollouts.scores(self.task.law(lm, batch.example), x)
        how = {"temperature": batch.temperature, "weight": batch.weight}
        strings = balance.strings(s.log_q, s.log_q_stop, batch.log_reward, x.length, **how)
        floored = balance.floored(strings, batch.log_prior)
        value = self.objective(params, floored, batch.example)
        log_reward = jnp.take_along_axis(batch.log_reward, x.length[:, None], axis=1)[:, 0]
        log_q = jax.lax.stop_gradient(s.log_prob(x.length))
        log_weights = log_reward - log_q
        known = jnp.isfinite(log_weights)
        mean = jnp.where(known, log_weights, 0.0).sum() / jnp.maximum(
            known.sum(dtype=jnp.float32), 1
        )
        # Of the guide's own draws: a behaviour may well look where rewards are zero.
        share = normalise(log_q - batch.log_behaviour)
        zero = jnp.where(jnp.isneginf(log_reward), share, 0.0).sum()
        flags = balance.flags(strings)
        return value, {"log_weight": mean, "tokens": batch.tokens, fit.ZERO: zero, **flags}


def _lm(guide: Guide, params: Params) -> LM:
    return dataclasses.replace(guide, params=params["guide"]).lm
