"""Is sampling from p^alpha worth its tokens?  Reasoning tasks that the model can sometimes solve,
at one budget.

    python -m experiments.power_sampling
    python -m experiments.power_sampling --survey    # how the tasks were chosen: by base accuracy

Base sampling, low temperature, the likeliest of eight, power sampling (arXiv 2510.14901), Power-SMC
(2602.10273) and parallel tempering (2609.38104) each give four answers or more, and draw about
thirty-two answers' tokens for them. Every finished cell is saved, so an interrupted run goes on
where it stopped.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import sys
import time
import zlib
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

import models
from models.tokenizer import Tokenizer
from ppl.lm import LM
from samplers import resampling

from .. import grid
from ..showing import saving
from . import report, tasks
from .methods import FAMILIES, NUM, Outcome
from .report import Cell, pass_at
from .tasks import KINDS, PAD_TO, Problem


@dataclasses.dataclass(frozen=True)
class Config:
    """What is run: the tasks, the families of methods, the powers, and how many problems of each
    task.
    """

    tasks: tuple[str, ...] = ("chain_sum", "number_sorting", "number_sequence")
    families: tuple[str, ...] = tuple(FAMILIES)
    alphas: tuple[float, ...] = (1.0, 2.0, 4.0)
    num_problems: int = 12
    model: str = "smollm2-135m"
    seed: int = 0


QUICK = Config(
    tasks=("number_sequence",),
    families=("low temperature", "power MH"),
    alphas=(1.0, 4.0),
    num_problems=2,
)
SURVEY = Config(families=("low temperature",), alphas=(1.0,))


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--survey", action="store_true", help="the base model only")
    number = f"of each task ({Config.num_problems})"
    parser.add_argument("--problems", type=int, metavar="P", help=number)


def _configure(args: argparse.Namespace) -> Config:
    config = QUICK if args.quick else SURVEY if args.survey else Config()
    number = args.problems
    return config if number is None else dataclasses.replace(config, num_problems=number)


def run(config: Config, cells: list[Cell], out: Path, console: Console) -> None:
    """Measure all cells that are not there yet, and append and save each."""
    load = functools.cache(lambda: models.load(config.model))
    of = functools.cache(lambda task: tasks.problems(task, config.num_problems, config.seed))
    done = {(cell.task, cell.method, cell.alpha) for cell in cells}

    def measure(task: str, family: str, alpha: float) -> list[Cell]:
        # A cell's draws do not depend on which cells were run before.
        key = jax.random.fold_in(
            jax.random.key(config.seed), zlib.crc32(f"{task} {family} {alpha:g}".encode())
        )
        return cell(key, *load(), task, family, alpha, of(task))

    wanted = [(t, f, a) for t in config.tasks for f in config.families for a in config.alphas]
    missing = [(t, f, a) for t, f, a in wanted if runs(f, a) and (t, _name(f, a), a) not in done]
    pending = [
        (f"{t}, {f}, alpha = {a:g}", functools.partial(measure, t, f, a)) for t, f, a in missing
    ]
    grid.fill(console, out, config, cells, pending)


def runs(family: str, alpha: float) -> bool:
    """Whether there is something to run: a ladder needs two powers."""
    return family != "tempering" or alpha > 1


def _name(method: str, alpha: float) -> str:
    """Without a power a low temperature is none."""
    return "base sampling" if (method, alpha) == ("low temperature", 1.0) else method


def cell(
    key: jax.Array,
    lm: LM,
    tokenizer: Tokenizer,
    task: str,
    family: str,
    alpha: float,
    problems: Sequence[Problem],
) -> list[Cell]:
    """Run a family of methods on all problems of a task."""
    found: dict[str, dict[str, list]] = {}
    start = time.perf_counter()
    for index, problem in enumerate(problems):
        ids = tokenizer.encode(problem.prompt)
        p = lm.given(ids, max_tokens=KINDS[task].max_tokens, pad_to=PAD_TO)
        run_key, draw_key = jax.random.split(jax.random.fold_in(key, index))
        for method, out in FAMILIES[family](run_key, p**alpha).items():
            if method != family and alpha != 1:
                continue  # the likeliest of the base model's draws only
            row = measured(draw_key, jax.device_get(out), tokenizer, problem, KINDS[task])
            for name, value in row.items():
                found.setdefault(_name(method, alpha), collections.defaultdict(list))[name].append(
                    value
                )
    seconds = time.perf_counter() - start
    return [
        Cell(task, method, alpha, **columns, seconds=seconds) for method, columns in found.items()
    ]


def measured(
    key: jax.Array, out: Outcome, tokenizer: Tokenizer, problem: Problem, kind: tasks.Kind
) -> dict[str, float | list[float]]:
    """What `Cell` has about one problem."""
    texts = [
        tokenizer.decode(t[:n])
        for t, n in zip(out.sequences.tokens, out.sequences.length, strict=True)
    ]
    said = [kind.read(text) for text in texts]
    right = np.array([answer is not None and problem.score(answer) >= 1 for answer in said], float)
    weights = saving.normalise(np.asarray(out.log_weights, np.float64))
    votes: dict[str, float] = collections.defaultdict(float)
    for answer, weight in zip(said, weights, strict=True):
        if answer is not None:
            votes[answer] += weight
    winner = max(votes, key=lambda answer: votes[answer], default=None)
    # Weighted strings are drawn by weight before they are counted.
    equal = np.ptp(out.log_weights) == 0
    drawn = (
        np.arange(len(said))
        if equal
        else np.asarray(resampling.systematic(key, jnp.asarray(out.log_weights), NUM))
    )
    groups = [{said[i] for i in group} for group in drawn.reshape(-1, NUM)]
    return {
        "accuracy": float(weights @ right),
        "vote": float(winner is not None and problem.score(winner) >= 1),
        "pass_at": [pass_at(k, int(right[drawn].sum()), len(drawn)) for k in range(1, NUM + 1)],
        "distinct": float(np.mean([len(group) / NUM for group in groups])),
        "log_prob": float(weights @ np.where(weights > 0, out.log_prob, 0.0)),
        "tokens": float(out.cost.tokens),
        "forwards": float(out.cost.forwards),
    }


EXPERIMENT = grid.Experiment(
    name="power_sampling",
    about=__doc__ or "",
    report=report,
    cell=Cell,
    which=("tasks", "families", "alphas"),
    configure=_configure,
    run=run,
    quick="two problems of one task",
    options=_options,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the experiment; returns the exit status: 0, 130 if interrupted."""
    return grid.main(EXPERIMENT, argv)


if __name__ == "__main__":
    sys.exit(main())
