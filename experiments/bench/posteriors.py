"""Neural posterior estimation beside sbi: the same simulations, batches and optimiser, spline
coupling flows of the same width, depth and number of transforms.

    python -m experiments.bench.posteriors         in the environment of `make bench-peers`

The task is gaussian_linear of the public benchmark: ten parameters, ten numbers observed, 10,000
simulations of which a tenth is held out.

    npe_training    seconds of three epochs (135 steps of 200 simulations, each epoch with the loss
                    on what is held out), Adam at 5e-4, gradients clipped at 5; theirs over ours
    npe_sampling    seconds of 10,000 draws for an observation that changes every time

Flows have 5 transforms of 10 bins, whose conditioners have six linear layers of width 50 (sbi's
are residual, with two blocks, and it has a linear map between transforms).  Sides take turns; what
is compiled is compiled before.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import warnings
from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import numpy as np
import optax
import torch
from sbi.inference import NPE
from sbi.neural_nets import posterior_nn
from torch.utils.tensorboard import SummaryWriter

from amortized import training
from amortized.fit import Fitted
from amortized.posteriors import flows, npe
from amortized.training import Training, trained_part

from ..posterior_tasks import TASKS
from .peers.report import OURS, table, take_turns, time_ratio

TASK, BUDGET, BATCH, EPOCHS = TASKS["gaussian_linear"], 10_000, 200, 3
RATE, CLIP, TRANSFORMS, WIDTH, BINS, DRAWS = 5e-4, 5.0, 5, 50, 10, 10_000
HIDDEN, BLOCKS = 5, 2
"""Hidden layers of a conditioner: a first one, and two in each of sbi's blocks."""
PEER = "sbi"


class Side(NamedTuple):
    """`train` goes on for some epochs and returns the last loss; `draw` takes an observation [K]
    and returns draws [N, D].
    """

    train: Callable[[int], float]
    draw: Callable[[int], np.ndarray]


def observation(seed: int) -> np.ndarray:
    return TASK.observation(1 + seed % 10)


def ours(prepared: Training) -> Side:
    """What `fit.run` compiles, some epochs at a time."""
    trained, fixed = trained_part(prepared.params)
    steps = EPOCHS * prepared.draw.steps
    parts = prepared.draw, prepared.loss, fixed, optax.adam(RATE), CLIP, 1, steps
    how = training.Method(jax.random.key(1), *parts)
    state = training.initial(how, *jax.tree.map(training.own, (trained, prepared.data)))
    made, posterior = 0, []

    def train(seed: int) -> float:
        nonlocal state, made
        del seed
        state, rows = training.steps((how, np.int32(made), np.int32(steps)), state)
        made += steps
        return float(np.asarray(rows["held_out"])[-steps // EPOCHS :].mean())

    def draw(seed: int) -> np.ndarray:
        if not posterior:
            network = eqx.combine(state.params, fixed)
            posterior.append(npe.posterior(Fitted(network, network, {}, None, made, "")))
        found = posterior[0].sample(jax.random.key(seed), observation(seed), DRAWS)
        return np.asarray(found["theta"])

    return Side(train, draw)


def theirs(prepared: Training, logs: str) -> Side:
    """sbi on the same simulations, of which it holds out a tenth of its own choice."""
    parts = prepared.draw.rows, prepared.draw.held_out
    theta = torch.from_numpy(np.concatenate([part.theta for part in parts]))
    x = torch.from_numpy(np.concatenate([part.x["x"] for part in parts]))
    torch.manual_seed(0)
    prior = torch.distributions.MultivariateNormal(torch.zeros(10), 0.1 * torch.eye(10))
    build = posterior_nn(
        "nsf", hidden_features=WIDTH, num_transforms=TRANSFORMS, num_bins=BINS, num_blocks=BLOCKS
    )
    log = SummaryWriter(logs)  # else in a folder where one stands
    it = NPE(prior, density_estimator=build, summary_writer=log, show_progress_bars=False)
    it.append_simulations(theta, x)
    epochs, posterior = 0, []

    def train(seed: int) -> float:
        nonlocal epochs
        del seed
        epochs += EPOCHS
        it.train(
            training_batch_size=BATCH,
            learning_rate=RATE,
            validation_fraction=0.1,
            stop_after_epochs=10**6,
            max_num_epochs=epochs - 1,
            clip_max_norm=CLIP,
            resume_training=epochs > EPOCHS,
        )
        return float(it.summary["validation_loss"][-1])

    def draw(seed: int) -> np.ndarray:
        if not posterior:
            posterior.append(it.build_posterior())
        x = torch.from_numpy(observation(seed))
        return posterior[0].sample((DRAWS,), x=x, show_progress_bars=False).numpy()

    return Side(train, draw)


def prepared() -> Training:
    """Simulations, and our network."""
    return npe.training(
        jax.random.key(0),
        TASK.model,
        latents=["theta"],
        observed=["x"],
        num_simulations=BUDGET,
        batch_size=BATCH,
        flow=flows.spline_coupling(
            num_layers=TRANSFORMS, width=WIDTH, depth=HIDDEN, knots=BINS, interval=3.0
        ),
    )


def compare(rounds: int) -> dict[str, float]:
    """Print both sides; the ratios of seconds, theirs over ours."""
    start = prepared()
    with tempfile.TemporaryDirectory() as logs:
        sides = {OURS: ours(start), PEER: theirs(start, logs)}
        return turns(sides, rounds)


def turns(sides: dict[str, Side], rounds: int) -> dict[str, float]:
    ratios, rows = {}, []
    for label, which in {"npe_training": "train", "npe_sampling": "draw"}.items():
        functions = {name: getattr(side, which) for name, side in sides.items()}
        seconds, found = take_turns(functions, rounds, label)
        ratios[label] = time_ratio(seconds, PEER)
        for name in sides:
            last = found[name][-1]
            said = f"{last:.3f}" if label == "npe_training" else f"{last.std():.3f}"
            faster = "" if name == OURS else f"{ratios[label]:.2f}"
            rows.append((name, label, f"{statistics.median(seconds[name]):.3f}", said, faster))
    columns = ("side", "what", "seconds", "held-out loss, spread", "faster by")
    table(f"{TASK.name}, {rounds} rounds", columns, rows)
    return ratios


def main() -> None:
    """Print a table and, last, one JSON line."""
    parser = argparse.ArgumentParser(prog="python -m experiments.bench.posteriors")
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    ratios = {name: round(value, 3) for name, value in compare(options.rounds).items()}
    load = f"{os.getloadavg()[1]:.1f} on {os.cpu_count()} cores"
    device = f"{jax.devices()[0].device_kind}, {torch.get_num_threads()} torch threads, load {load}"
    print(json.dumps({"name": "posteriors", "ratios": ratios, "device": device}))


if __name__ == "__main__":
    main()
