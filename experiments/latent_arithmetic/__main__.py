"""Does amortised inference of a rationale answer sums better than imitation of worked solutions?

    python -m experiments.latent_arithmetic

A rationale is latent between question and answer.  The base model, adapters trained on reference
rationales, and adapters trained as a GFlowNet on p(rationale, answer | question) (arXiv
2310.04363), with interpolated rewards and reference-guided filtering (2510.23925), write rationales
for sums as long as those they were trained on, and longer ones.  The frozen base model answers.
Training runs and finished cells are saved, so an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import sys
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray
from rich.console import Console

from amortized import fit
from amortized.strings import behaviours, gflownet, guide, latent, prefix_rewards, replay, rollouts
from amortized.strings.guide import Guide
from amortized.training import Training
from ppl.lm import LM
from ppl.pytrees import register_dataclass
from ppl.sequences import Sequences
from samplers.diagnostics import ess

from .. import grid
from . import report
from .report import BASE, GFLOWNET, SUPERVISED, Cell
from .world import World, expressions, law_of, reference

GREEDY = 1e-4
"""A temperature at which the likeliest token is drawn."""
LONGER = 1
"""Terms by which the sums out of distribution are longer."""


@dataclasses.dataclass(frozen=True)
class Config:
    """What is run: the sums, the steps of training and what is in one, and rationales per question
    in the tests.

    The supervised steps have so many worked solutions, the GFlowNet's so many strings, of which a
    quarter is replayed; log Phi of prefixes is exact at every `every` tokens.
    """

    methods: tuple[str, ...] = (BASE, SUPERVISED, GFLOWNET)
    num_terms: int = 3
    num_train: int = 32
    num_problems: int = 12
    num_steps: int = 100
    num_solutions: int = 4
    num_strings: int = 8
    every: int = 9
    num_rationales: int = 8
    rank: int = 8
    learning_rate: float = 5e-4
    model: str = "smollm2-135m"
    seed: int = 0


QUICK = Config(num_train=4, num_problems=2, num_steps=2, num_strings=4, num_rationales=2)


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, metavar="S", help=f"of training ({Config.num_steps})")


def _configure(args: argparse.Namespace) -> Config:
    config = QUICK if args.quick else Config()
    return config if args.steps is None else dataclasses.replace(config, num_steps=args.steps)


def run(config: Config, cells: list[Cell], out: Path, console: Console) -> None:
    """Train and measure what is not there yet, and append and save each cell."""
    key = jax.random.key(config.seed)
    world = functools.cache(lambda: World.load(config.model))

    @functools.cache
    def tasks(terms: int) -> tuple[gflownet.Task, gflownet.Task]:
        """To be asked, and to learn from; no sum is in both."""
        both = expressions(terms, config.num_problems + config.num_train, config.seed)
        return world().task(both[: config.num_problems]), world().task(both[config.num_problems :])

    @functools.cache
    def trained(method: str) -> tuple[Guide, float]:
        fit_key = jax.random.fold_in(key, zlib.crc32(method.encode()))
        begin = time.perf_counter()
        found = train(fit_key, config, method, tasks(config.num_terms)[1], out / "checkpoints")
        return found, time.perf_counter() - begin

    def measure(method: str, terms: int) -> list[Cell]:
        found, seconds = trained(method)
        # The same keys for all methods: what differs is the guide.
        rows = test(jax.random.fold_in(key, terms), config, world(), found, tasks(terms)[0])
        return [Cell(method, terms, terms == config.num_terms, **rows, training_seconds=seconds)]

    done = {(cell.method, cell.num_terms) for cell in cells}
    wanted = [(m, n) for m in config.methods for n in (config.num_terms, config.num_terms + LONGER)]
    pending = [
        (f"{m}, {n} terms", functools.partial(measure, m, n))
        for m, n in wanted
        if (m, n) not in done
    ]
    grid.fill(console, out, config, cells, pending)


# Training.


def train(
    key: PRNGKeyArray, config: Config, method: str, task: gflownet.Task, checkpoints: Path
) -> Guide:
    """The base model with fresh adapters, trained by a method; a run that was
    interrupted goes on.
    """
    init_key, fit_key = jax.random.split(key)
    g = guide.lora(init_key, task.lm, rank=config.rank)
    if method == BASE:
        return g
    training = (_supervised if method == SUPERVISED else _gflownet)(config, g, task)
    rate = optax.linear_schedule(config.learning_rate / 10, config.learning_rate, 10)
    # What depends on the config goes to a folder of its own.
    settings = {
        name: value for name, value in dataclasses.asdict(config).items() if name != "methods"
    }
    folder = f"{method.lower()}-{zlib.crc32(json.dumps(settings).encode()):08x}"
    out = fit.run(
        fit_key,
        training,
        optimizer=optax.adamw(rate),
        num_steps=config.num_steps,
        max_grad_norm=1.0,
        chunk=10,
        directory=checkpoints / folder,
        save_every=1,
        config=settings,
        progress=False,
    )
    if out.stopped == "interrupted":
        raise KeyboardInterrupt
    return dataclasses.replace(g, params=out.params["guide"])


def _gflownet(config: Config, g: Guide, task: gflownet.Task) -> Training:
    """Sub-trajectory balance of interpolated rewards, on strings as good as the references, which
    are replayed.
    """
    rewards = prefix_rewards.interpolated(config.every)
    training = gflownet.training(
        g,
        task,
        num=config.num_strings,
        objective=gflownet.modified_subtb,
        rewards=rewards,
        slots=config.num_strings,
    )
    known = latent.references(task, reference(task.examples), rewards)
    buffer = replay.add(
        training.data.replay, known.sequences, known.log_reward, jnp.arange(task.num)
    )
    delta = optax.linear_schedule(1.5, 1.0, max(config.num_steps // 2, 1))
    return dataclasses.replace(
        training,
        draw=latent.Filtered(training.draw, known, delta),
        data=training.data._replace(replay=buffer),
    )


def _supervised(config: Config, g: Guide, task: gflownet.Task) -> Training:
    """Maximum likelihood of the reference rationales."""
    return Training(
        params={"guide": g.params},
        draw=Solutions(config.num_solutions, task.num),
        loss=Likelihood(g, task),
    )


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Solutions:
    """Some of the examples, by their numbers."""

    num: int = dataclasses.field(metadata={"static": True})
    of: int = dataclasses.field(metadata={"static": True})

    def __call__(self, key: PRNGKeyArray, params: Any, data: None) -> tuple[Int[Array, " N"], None]:
        return jax.random.randint(key, (self.num,), 0, self.of), None


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Likelihood:
    """Mean -log q of the examples' reference rationales."""

    guide: Guide
    task: gflownet.Task

    def __call__(
        self, params: gflownet.Params, key: PRNGKeyArray, batch: Int[Array, " N"]
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        lm = dataclasses.replace(self.guide, params=params["guide"]).lm

        def one(index: Int[Array, ""]) -> Float[Array, ""]:
            z = jax.tree.map(lambda leaf: leaf[index][None], reference(self.task.examples))
            return -rollouts.scores(self.task.law(lm, index), z).log_prob(z.length)[0]

        return jax.vmap(one)(batch).mean(), {}


# Tests.


def test(
    key: PRNGKeyArray, config: Config, world: World, g: Guide, task: gflownet.Task
) -> dict[str, list[float]]:
    """What `Cell` has about every question; question i's draws depend on the key and i alone."""
    rows = []
    for index in range(task.num):
        asked = jax.tree.map(lambda leaf, i=index: leaf[i], task.examples)
        question_key = jax.random.fold_in(key, index)
        rows.append(
            jax.device_get(
                _asked(question_key, world.lm, g, asked, (world.answers, world.length), config)
            )
        )
    return {name: [float(row[name]) for row in rows] for name in rows[0]}


@functools.partial(jax.jit, static_argnames="config")
def _asked(
    key: PRNGKeyArray, lm: LM, g: Guide, asked: Any, answers: tuple[Array, Array], config: Config
) -> dict[str, Array]:
    """One greedy rationale and N drawn ones from the guide; the base model answers, and the answers
    are ranked.
    """
    p, q = law_of(lm, asked), law_of(g.lm, asked)
    temperature = jnp.where(jnp.arange(1 + config.num_rationales) == 0, GREEDY, 1.0)
    how = behaviours.drawn(temperature=temperature)
    z: Sequences = rollouts.roll(key, q, p, how, rewards=prefix_rewards.at_the_end).sequences
    scored = latent.score(p, q, z, *answers)
    drawn = jax.tree.map(lambda leaf: leaf[1:], scored)
    right = asked["right"]

    def is_right(score: Float[Array, " J"]) -> Array:
        return score.argmax() == right

    said = jax.nn.softmax(drawn.log_answer, axis=1)[:, right]
    return {
        "greedy": is_right(scored.log_answer[0]),
        "sampled": said.mean(),
        "logmeanexp": is_right(drawn.logmeanexp),
        "importance": is_right(drawn.importance),
        "geomean_norm": is_right(drawn.geomean_norm),
        "log_likelihood": drawn.importance[right],
        "ess": ess(drawn.log_weights[:, right]) / config.num_rationales,
    }


EXPERIMENT = grid.Experiment(
    name="latent_arithmetic",
    about=__doc__ or "",
    report=report,
    cell=Cell,
    which=("methods",),
    configure=_configure,
    run=run,
    quick="two steps of training, two questions",
    options=_options,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the experiment; returns the exit status: 0, 130 if interrupted."""
    return grid.main(EXPERIMENT, argv)


if __name__ == "__main__":
    sys.exit(main())
