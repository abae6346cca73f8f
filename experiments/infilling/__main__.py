"""The missing words of a story: can a language model learn to draw from p(Z | beginning, ending)?

    python -m experiments.infilling

The posterior of words Z between a beginning X and an ending Y is p(Z | X) p(Y | X, Z) / p(Y | X)
(arXiv 2310.04363). A LoRA guide, which is shown both ends, is trained as a GFlowNet; then every
proposal draws words for stories that it was trained on and for others, and importance weights make
the answers exact: what is compared is how much of a sample they leave, how far a proposal is from
the posterior, how likely the whole is, how varied, and at what cost.  Training goes on from its
checkpoint, and every finished cell is saved.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console

import models
import ppl
from amortized import fit
from amortized.strings import evidence, gflownet, guide, prefix_rewards
from models.tokenizer import Tokenizer
from ppl.lm import LM
from ppl.target import Target
from samplers import smc
from samplers.strings.proposals import LanguageModel, bootstrap

from .. import grid
from . import report, stories
from .report import Cell
from .stories import Story

MAX_TOKENS = 3
STEPS = ppl.Steps(every=1)
"""Where particles are weighed by how likely the ending is by then, and resampled."""


@dataclasses.dataclass(frozen=True)
class Config:
    """What is run."""

    num_trained: int = 4
    num_held_out: int = 4
    num_steps: int = 400
    num_strings: int = 8
    num_draws: int = 128
    num_particles: int = 32
    rank: int = 8
    learning_rate: float = 2e-3
    model: str = "smollm2-135m"
    seed: int = 0


MEASURING = ("num_held_out", "num_draws", "num_particles")
"""What training does not depend on."""
QUICK = Config(
    num_trained=1, num_held_out=1, num_steps=2, num_strings=2, num_draws=4, num_particles=4, rank=1
)
METHODS = ("prior", "prompting", "GFlowNet", "SMC, prior", "SMC, GFlowNet")


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, metavar="S", help=f"of training ({Config.num_steps})")


def _configure(args: argparse.Namespace) -> Config:
    config = QUICK if args.quick else Config()
    return config if args.steps is None else dataclasses.replace(config, num_steps=args.steps)


def run(config: Config, cells: list[Cell], out: Path, console: Console) -> None:
    """Train the guide, or go on with it, and measure all cells that are not there yet."""
    lm, tokenizer = models.load(config.model)
    trained = stories.TRAINING[: config.num_trained]
    task = task_of(lm, tokenizer, trained)
    held_out = task_of(lm, tokenizer, stories.HELD_OUT[: config.num_held_out])
    fitted = train(config, task, out)
    if fitted.stopped == "interrupted":
        raise KeyboardInterrupt
    learned = dataclasses.replace(_fresh(config, task), params=fitted.params["guide"])
    learned.save(out / "guide")
    done = {(cell.stories, cell.method) for cell in cells}
    pending = [
        (
            f"{name}, {method}",
            functools.partial(measure, config, tokenizer, of, learned, name, method),
        )
        for method in METHODS  # the quick ones first
        for name, of in {"trained on": task, "held out": held_out}.items()
        if (name, method) not in done
    ]
    grid.fill(console, out, config, cells, pending)


# Stories as targets.


class Gap(NamedTuple):
    """A story's tokens: before the missing ones, which they are, and after them."""

    before: list[int]
    missing: list[int]
    after: list[int]


def gap(tokenizer: Tokenizer, story: Story) -> Gap:
    """A story without `MAX_TOKENS` tokens in the middle of its first sentence."""
    first, last = tokenizer.encode(story.beginning), tokenizer.encode(f" {story.ending}")
    start = (len(first) - MAX_TOKENS) // 2
    return Gap(first[:start], first[start : start + MAX_TOKENS], first[start + MAX_TOKENS :] + last)


def task_of(lm: LM, tokenizer: Tokenizer, some: Sequence[Story]) -> gflownet.Task:
    """The posteriors of their missing words."""
    between = tokenizer.encode("\n\n")

    def texts(story: Story) -> dict[str, list[int]]:
        of = gap(tokenizer, story)
        return {"before": of.before, "after": of.after, "shown": of.after + between + of.before}

    # As wide as the longest of all stories, so that all tasks have one shape.
    every = [texts(story) for story in stories.TRAINING + stories.HELD_OUT]
    examples = {}
    for name in every[0]:
        size = max(len(text[name]) for text in every)
        rows = [texts(story)[name] for story in some]
        examples[name] = jnp.asarray([np.pad(row, (0, size - len(row))) for row in rows], jnp.int32)
        examples[f"{name}_length"] = jnp.asarray([len(row) for row in rows], jnp.int32)
    return gflownet.Task(lm, examples, posterior, shown)


def prior(lm: LM, example: Any) -> Target:
    """p(Z | X)."""
    return Target(lm, lm.read(example["before"], example["before_length"]), MAX_TOKENS)


def posterior(lm: LM, example: Any, steps: ppl.Steps | None = None) -> Target:
    """p(Z | X) p(Y | X, Z); in steps, particles see how likely the ending is after each."""
    p = prior(lm, example)
    return p * ppl.continuation(
        p, example["after"], example["after_length"], steps=steps, after_eos=False
    )


def shown(lm: LM, example: Any) -> Target:
    """A model that is shown the ending, then the beginning."""
    return Target(lm, lm.read(example["shown"], example["shown_length"]), MAX_TOKENS)


# Training and measuring.


def _fresh(config: Config, task: gflownet.Task) -> guide.Guide:
    return guide.lora(_key(config, "adapters"), task.lm, rank=config.rank)


def _key(config: Config, what: str) -> jax.Array:
    """A key for each thing that draws, whichever others there are."""
    return jax.random.fold_in(jax.random.key(config.seed), zlib.crc32(what.encode()))


def train(config: Config, task: gflownet.Task, out: Path) -> fit.Fitted:
    """A LoRA guide by VarGrad, which needs the rewards of whole strings only."""
    start = _fresh(config, task)
    training = gflownet.training(
        start, task, num=config.num_strings, rewards=prefix_rewards.at_the_end, slots=16
    )
    rate = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, 10, max(config.num_steps, 11)
    )
    return fit.run(
        _key(config, "training"),
        training,
        optimizer=optax.adamw(rate),
        num_steps=config.num_steps,
        max_grad_norm=1.0,
        chunk=min(20, config.num_steps),
        save_every=1,
        directory=out / "checkpoints",
        config={
            name: value
            for name, value in dataclasses.asdict(config).items()
            if name not in MEASURING
        },
    )


def measure(
    config: Config,
    tokenizer: Tokenizer,
    task: gflownet.Task,
    learned: guide.Guide,
    name: str,
    method: str,
) -> list[Cell]:
    """One method on all stories of a task."""
    key = _key(config, f"{name}, {method}")
    start, rows = time.perf_counter(), []
    for i in range(task.num):
        rows.append(
            _measured(jax.random.fold_in(key, i), config, tokenizer, task, learned.lm, i, method)
        )
    columns = {column: [row[column] for row in rows] for column in rows[0]}
    return [Cell(name, method, **columns, seconds=time.perf_counter() - start)]


def _measured(
    key: jax.Array,
    config: Config,
    tokenizer: Tokenizer,
    task: gflownet.Task,
    learned: LM,
    i: int,
    method: str,
) -> dict[str, Any]:
    example = jax.tree.map(lambda leaf: leaf[i], task.examples)
    target = task.target(i)
    laws = {"prior": lambda: prior(task.lm, example), "prompting": lambda: shown(task.lm, example)}
    laws["GFlowNet"] = lambda: shown(learned, example)
    if method in laws:
        found = evidence.draws(key, target, laws[method](), num_particles=config.num_draws)
        tokens = int((found.sequences.length + found.sequences.ended).sum())
    else:
        proposal = bootstrap if method == "SMC, prior" else LanguageModel(shown(learned, example))
        options = {"num_particles": config.num_particles, "proposal": proposal, "steps": STEPS}
        out = smc.run(key, posterior(task.lm, example, STEPS), **options)
        found, tokens = (
            evidence.Evidence(out.sequences, out.log_weights + out.log_z),
            int(out.cost.tokens),
        )
    x = found.sequences
    log_joint = np.asarray(target.log_density(x.tokens, x.length), np.float64)
    # SMC's strings count by their weights; the others are looked at as they were drawn.
    shares = np.exp(np.asarray(found.log_weights - jax.nn.logsumexp(found.log_weights), np.float64))
    plain = np.full_like(shares, 1 / len(shares)) if method in laws else shares
    best = int(np.argmax(found.log_weights))
    return {
        "ess": float(found.ess),
        "elbo": float(found.elbo) if method in laws else None,
        "log_z": float(found.log_z),
        "log_joint": float((plain * log_joint).sum()),
        "distinct": evidence.distinct(x),
        "tokens": tokens,
        "middle": tokenizer.decode(x.tokens[best, : x.length[best]].tolist()),
    }


EXPERIMENT = grid.Experiment(
    name="infilling",
    about=__doc__ or "",
    report=report,
    cell=Cell,
    which=(),
    configure=_configure,
    run=run,
    quick="two steps on one story",
    options=_options,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the experiment; returns the exit status: 0, 130 if interrupted."""
    return grid.main(EXPERIMENT, argv)


if __name__ == "__main__":
    sys.exit(main())
