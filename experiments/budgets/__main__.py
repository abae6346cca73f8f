"""Which test-time method is worth its tokens?  Votes, best-of-n, what lies between them, rules that
stop, and allocations, at equal budgets.

    python -m experiments.budgets                         # worlds where the truth is known
    python -m experiments.budgets --model smollm2-135m    # tasks of reasoning-gym
    python -m experiments.budgets --tasks chain_sum,countdown --budgets 4096

Every prompt's strings are drawn once, and all methods and budgets are replayed on them. A budget is
tokens for each prompt, and buys as many strings as it does on average; what was really spent, calls
of the verifier and sequential passes are in the table. Every drawn prompt and every finished cell
is saved, so an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from rich.console import Console

import models

from .. import grid
from ..power_sampling.tasks import problems
from . import methods, report, steps, texts, worlds
from .banks import Bank
from .methods import Found
from .report import Cell
from .worlds import WORLDS, World

PARTS = ("choices", "stopping", "allocation")
MODEL = "smollm2-135m"
"""What tasks are put to, if nothing else is said."""
STEPS = "steps"
"""The name of a world, and of its only part."""


@dataclasses.dataclass(frozen=True)
class Config:
    """What is run: the worlds, the parts and the budgets, in tokens for each prompt; how many
    prompts and draws there are, and in how many orders the draws are replayed.
    """

    worlds: tuple[str, ...] = (*WORLDS, STEPS)
    parts: tuple[str, ...] = PARTS
    budgets: tuple[int, ...] = (16, 64, 256, 1024)
    num_prompts: int = 64
    num_draws: int = 256
    num_orders: int = 16
    model: str = ""
    seed: int = 0


QUICK = Config(worlds=tuple(WORLDS), budgets=(32, 128), num_prompts=16, num_draws=32, num_orders=2)
WHICH = ("worlds", "parts", "budgets")


def _options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    every = ", ".join((*Config.worlds, *texts.TASKS))
    add("--tasks", type=_names, metavar="A,B", help=f"which of {every}; the last with a model")
    text = f"tokens for each prompt ({' '.join(map(str, Config.budgets))})"
    add("--budgets", type=_budget, nargs="+", metavar="B", help=text)
    add("--prompts", type=_count, metavar="P", help=f"of each world ({Config.num_prompts})")
    add("--draws", type=_count, metavar="N", help=f"of each prompt ({Config.num_draws})")


def _names(text: str) -> tuple[str, ...]:
    """Worlds, or tasks."""
    names = tuple(text.split(","))
    for known in (Config.worlds, texts.TASKS):
        if set(names) <= set(known):
            return names
    raise argparse.ArgumentTypeError(
        f"expected worlds of {', '.join(Config.worlds)}, or tasks of {', '.join(texts.TASKS)}, got"
        f" {text}"
    )


def _count(text: str) -> int:
    """A whole number of at least 2: of fewer prompts there is no error, of fewer draws no vote."""
    if not text.isdigit() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 2, got {text}")
    return int(text)


def _budget(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a budget of at least 1 token, got {text}")
    return int(text)


def _configure(args: argparse.Namespace) -> Config:
    config = QUICK if args.quick else Config()
    if args.tasks and args.tasks[0] in texts.TASKS:
        args.model = args.model or MODEL
    elif args.tasks and args.model:
        raise ValueError(
            f"expected tasks of {', '.join(texts.TASKS)} for a model, got {', '.join(args.tasks)};"
            " leave out --model"
        )
    if args.model:
        config = dataclasses.replace(config, worlds=texts.TASKS)
        if args.quick:
            config = dataclasses.replace(config, worlds=texts.TASKS[:1], num_prompts=2, num_draws=8)
    given = {"num_prompts": args.prompts, "num_draws": args.draws}
    given["worlds"] = args.tasks
    given["budgets"] = None if args.budgets is None else tuple(args.budgets)
    return dataclasses.replace(config, **{k: v for k, v in given.items() if v is not None})


def run(config: Config, cells: list[Cell], out: Path, console: Console) -> None:
    """Measure all cells that are not there yet, and append and save each.

    Raises:
        ValueError: if no budget holds a string of any world.
    """
    done = {(cell.world, cell.part, cell.budget) for cell in cells}
    pending = _asked(config, out) if config.model else _tabular(config)
    missing = [(label, measure) for which, label, measure in pending if which not in done]
    grid.fill(console, out, config, cells, missing)
    if not any(cell.accuracies for cell in cells):
        raise ValueError(
            f"expected a budget that holds a string, got {max(config.budgets)} tokens at most:"
            f" {cells[0].why}; give --budgets more"
        )


Which = tuple[str, str, int]
"""World, part and budget: the cells of these are measured together."""
Asked = list[tuple[Which | None, str, Callable[[], list[Cell]]]]
"""What a run consists of, with a label; what has no cells has no `Which`."""


def _tabular(config: Config) -> Asked:
    @functools.cache
    def made(name: str) -> tuple[World, Bank]:
        rng = np.random.default_rng([config.seed, zlib.crc32(name.encode())])
        world = WORLDS[name](rng, config.num_prompts)
        return world, world.bank(rng, config.num_draws)

    @functools.cache
    def of_steps() -> steps.World:
        return steps.World(config.seed, config.num_prompts // 4, 2 * config.num_orders)

    def measure(name: str, part: str, budget: int) -> list[Cell]:
        if name == STEPS:
            return stepwise(of_steps(), budget)
        world, bank = made(name)
        return measured(config, name, part, budget, bank, world)

    return [
        ((name, part, budget), f"{name}, {part}, {budget} tokens", measure_it)
        for name in config.worlds
        for part in ((STEPS,) if name == STEPS else config.parts)
        for budget in config.budgets
        for measure_it in [functools.partial(measure, name, part, budget)]
    ]


def _asked(config: Config, out: Path) -> Asked:
    """Of each task first the draws that are not there, then all methods on them."""
    about = {name: getattr(config, name) for name in ("model", "seed", "num_prompts", "num_draws")}
    drawn = texts.Drawn(out / texts.DRAWS, about)
    load = functools.cache(lambda: models.load(config.model))
    of = functools.cache(lambda task: problems(task, config.num_prompts, config.seed))
    bank = functools.cache(lambda task: texts.bank(load()[1], task, of(task), drawn))

    def draw(task: str) -> list[Cell]:
        texts.draw(config.seed, *load(), task, of(task), drawn)
        return []

    def measure(task: str, part: str, budget: int) -> list[Cell]:
        return measured(config, task, part, budget, bank(task))

    asked: Asked = []
    for task in config.worlds:
        there = len(drawn.strings.get(task, []))
        asked += [
            (None, f"{task}, prompt {i + 1}", functools.partial(draw, task))
            for i in range(there, config.num_prompts)
        ]
        asked += [
            (
                (task, part, b),
                f"{task}, {part}, {b} tokens",
                functools.partial(measure, task, part, b),
            )
            for part in config.parts
            for b in config.budgets
        ]
    return asked


def measured(
    config: Config, name: str, part: str, budget: int, bank: Bank, world: World | None = None
) -> list[Cell]:
    """The cells of a part at a budget; one that says why if nothing can be run."""
    num = bank.strings(budget)
    if not 1 <= num <= bank.num:
        why = NOTHING if num < 1 else f"{num} > {bank.num} draws"
        return [Cell(name, part, WHOLE[part], budget, num, [], [], 0.0, 0.0, why=why)]
    # The same orders at every budget; other cells do not matter.
    seed = zlib.crc32(f"{name} {part}".encode())
    rng = np.random.default_rng([config.seed, seed])
    key = jax.random.fold_in(jax.random.key(config.seed), seed)
    runs: dict[str, Callable[[], dict[str, Found]]] = {
        "choices": lambda: methods.choices(key, bank, num, config.num_orders),
        "stopping": lambda: methods.stops(key, bank, num, config.num_orders),
        "allocation": lambda: methods.allocations(
            rng, bank, num, config.num_orders, None if world is None else world.p
        ),
    }
    out = []
    for method, found in runs[part]().items():
        law = None if world is None else worlds.exact(world, method, num)
        exact = None if law is None else float(law.mean())
        out.append(_cell(found, (name, part, method, budget, num), exact))
    return out


def stepwise(world: steps.World, budget: int) -> list[Cell]:
    """The cells of the world of steps at a budget."""
    num = world.strings(budget)
    if num < 1:
        return [Cell(STEPS, STEPS, WHOLE[STEPS], budget, num, [], [], 0.0, 0.0, why=NOTHING)]
    found = world.found(num)
    return [_cell(of, (STEPS, STEPS, method, budget, num)) for method, of in found.items()]


def _cell(found: Found, which: tuple[str, str, str, int, int], exact: float | None = None) -> Cell:
    rest = (found.accuracy.tolist(), found.tokens.tolist(), found.reward_calls, found.depth)
    return Cell(*which, *rest, exact=exact)


NOTHING = "no string fits"
WHOLE = {
    "choices": "any choice",
    "stopping": "any rule",
    "allocation": "any allocation",
    STEPS: "any method",
}
"""What a cell is of where no method could be run."""
EXPERIMENT = grid.Experiment(
    name="budgets",
    about=__doc__ or "",
    report=report,
    cell=Cell,
    which=WHICH,
    configure=_configure,
    run=run,
    quick="fewer prompts, draws and budgets",
    options=_options,
    model=("", "of the tasks of reasoning-gym; without one, worlds where the truth is known"),
    part=lambda config: Path(config.model).name or "tabular",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the experiment; returns the exit status: 0, 130 if interrupted."""
    return grid.main(EXPERIMENT, argv)


if __name__ == "__main__":
    sys.exit(main())
