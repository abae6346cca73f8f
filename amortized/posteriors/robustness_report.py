"""How much can a small change of the observation do to networks, and what does resistance cost?

    out = robustness_report.run(
        key, {"plain": plain, "regularised": robust}, x, radii=[0.1, 0.3, 1.0]
    )
    print(out)                # or show it in a notebook
    out.plot().savefig("robustness.png")

For every network and every size of a change d, over the given observations,

    worst     max KL(q_x || q_{x+d}) over |d| <= size, as far as `robustness.attack` finds it
    random    the mean over directions d of that length

A network whose worst is far above its random follows directions that no noise would take.  Of small
changes both come from the Fisher information I_x: the worst is size^2 / 2 times its largest
eigenvalue, the random one size^2 / 2 times tr I_x / P, of P observed numbers.  What resistance
costs shows on simulations: a larger loss, and coverage that is off.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Key, PRNGKeyArray
from matplotlib.figure import Figure
from rich import box

from ppl.checks import check_counts, check_key
from ppl.showing import shown
from ppl.table import Table, Tabled

from ..calibration import coverage, pictures
from ..calibration.coverage import Coverage
from ..calibration.joint import Joint
from ..calibration.report import LEVEL, brief
from . import robustness
from .network import Network
from .posterior import Posterior
from .simulators import Observation, Simulations

DRAWS = 99
"""Of each simulation's posterior, for its coverage."""
DIRECTIONS = 10
"""Random ones of each observation and size."""


@shown
@dataclasses.dataclass(frozen=True)
class Line:
    """One network: KL of R sizes and B observations, and what it pays.

    Attributes:
        name: of the network.
        worst, random: [R, B] KL in nats.
        fisher: [B] tr I_x.
        losses: [N] -log q(theta | x) of simulations, on R^D.
        coverage: of central intervals on them.
    """

    name: str
    worst: Float[np.ndarray, "R B"]
    random: Float[np.ndarray, "R B"]
    fisher: Float[np.ndarray, " B"]
    losses: Float[np.ndarray, " N"]
    coverage: Coverage


@dataclasses.dataclass(frozen=True, repr=False)
class Report(Tabled):
    """What changes do to networks; `print` shows the table, and so does a notebook.

    Attributes:
        radii: [R] sizes of changes, in units of the observation.
        lines: of the networks.
    """

    radii: tuple[float, ...]
    lines: tuple[Line, ...]

    @property
    def table(self) -> Table:
        """Means over observations and simulations, with their standard errors."""
        view = Table(box=box.SIMPLE_HEAD, caption=self._words(), caption_justify="left")
        for name in ("network", "size", "worst", "random", "tr I", "loss", "p", ""):
            view.add_column(name, justify="right" if name not in ("network", "") else "left")
        for line in self.lines:
            pays = (
                f"{line.fisher.mean():.3g}",
                f"{line.losses.mean():.2f} ± {line.losses.std() / len(line.losses) ** 0.5:.2f}",
                brief(line.coverage.p_value),
                _side(line.coverage),
            )
            for k, radius in enumerate(self.radii):
                kls = f"{line.worst[k].mean():.2g}", f"{line.random[k].mean():.2g}"
                first, *rest = (line.name, *pays) if k == 0 else ("",) * 5
                view.add_row(first, f"{radius:g}", *kls, *rest)
        return view

    def _words(self) -> str:
        first = self.lines[0]
        return (
            f"Worst and random are KL in nats, means of {first.fisher.size} observations; loss and"
            f" p of coverage are of {first.losses.size:,} simulations."
        )

    def plot(self) -> Figure:
        """KL over the size of the change, worst and random; and every network's coverage."""
        num = len(self.lines)
        figure = Figure(figsize=(4 + 3.2 * num, 3.2), layout="constrained")
        left, *rest = figure.subplots(1, 1 + num, width_ratios=[1.25] + [1] * num)
        for k, line in enumerate(self.lines):
            shade = pictures.CURVES[k % len(pictures.CURVES)]
            left.loglog(self.radii, line.worst.mean(1), marker="o", color=shade, label=line.name)
            left.loglog(self.radii, line.random.mean(1), color=shade, linestyle=":")
        left.set_xticks(self.radii, [f"{radius:g}" for radius in self.radii])
        left.minorticks_off()
        left.legend(fontsize=8, frameon=False)
        pictures.styled(left, "worst change, and random (dotted)", "size of the change")
        left.set_ylabel("KL in nats", **pictures.STYLE)
        for axes, line in zip(rest, self.lines, strict=True):
            pictures.curves(axes, line.coverage)
            axes.set_title(f"{line.name}   p = {line.coverage.p_value:.2g}", loc="left", fontsize=9)
        return figure


def run(
    key: PRNGKeyArray,
    posteriors: Mapping[str, Posterior],
    x: Any,
    *,
    radii: Sequence[float],
    num_simulations: int = 1000,
    num_steps: int = 50,
    num_samples: int = 100,
) -> Report:
    """What changes of observations do to networks, and what these networks pay.

    All networks see the same simulations, observations and random changes.

    Args:
        key: typed key.
        posteriors: by name, of one model.
        x: observations [B, ...] by name, or of a single site the array.
        radii: R sizes of changes, in units of the observation.
        num_simulations: for loss and coverage.
        num_steps, num_samples: of `robustness.attack`.

    Raises:
        ValueError: as `robustness.attack`, and if there is no network or no size.
    """
    check_key(key)
    check_counts(num_simulations=num_simulations, num_steps=num_steps, num_samples=num_samples)
    if not posteriors or not len(radii):
        raise ValueError(
            f"expected at least one network and one size of a change, got {list(posteriors)} and"
            f" {list(radii)}"
        )
    seen = _observations(next(iter(posteriors.values())), x, min(radii))
    keys = jax.random.split(key, 5)
    lines = []
    for name, posterior in posteriors.items():
        network = posterior.network
        found = [
            _changed(network, keys[0], seen, jnp.float32(radius), num_steps, num_samples)
            for radius in radii
        ]
        worst, random = (np.stack(list(map(np.asarray, kls))) for kls in zip(*found, strict=True))
        fisher = _fisher(network, keys[1], seen, 10 * num_samples)
        losses, covered = _paid(keys[2:], posterior, num_simulations)
        lines.append(Line(name, worst, random, np.asarray(fisher), losses, covered))
    return Report(tuple(map(float, radii)), tuple(lines))


def _observations(posterior: Posterior, x: Any, radius: float) -> Observation:
    """Checked, each by itself, and together again [B, ...]."""
    sizes = {len(leaf) for leaf in jax.tree.leaves(x)}
    if len(sizes) != 1 or 0 in sizes:
        raise ValueError(
            f"expected observations [B, ...] with one B, got {sorted(sizes)}; of one write x[None]"
        )
    rows = [
        robustness.checked(posterior, jax.tree.map(lambda leaf, i=i: leaf[i], x), radius)
        for i in range(*sizes)
    ]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)


@eqx.filter_jit
def _changed(
    network: Network,
    key: PRNGKeyArray,
    x: Observation,
    radius: Float[Array, ""],
    num_steps: int,
    num_samples: int,
) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """KL of every observation's worst change, and of random ones."""

    def one(row: tuple[PRNGKeyArray, Observation]) -> tuple[Array, Array]:
        key, x = row
        first, second, third = jax.random.split(key, 3)
        flat, unravel = ravel_pytree(x)
        directions = jax.random.normal(second, (DIRECTIONS, flat.size), flat.dtype)

        def random(key: PRNGKeyArray, direction: Float[Array, " P"]) -> Float[Array, ""]:
            changed = unravel(flat + radius * robustness.unit(direction))
            contexts = network.summary(x), network.summary(changed)
            return robustness.divergence(key, network, *contexts, 10 * num_samples)

        worst = robustness.worst(first, network, x, radius, num_steps, num_samples)
        return worst.kl, jax.vmap(random)(jax.random.split(third, DIRECTIONS), directions).mean()

    num = len(jax.tree.leaves(x)[0])
    return jax.lax.map(one, (jax.random.split(key, num), x))


@eqx.filter_jit
def _fisher(
    network: Network, key: PRNGKeyArray, x: Observation, num_samples: int
) -> Float[Array, " B"]:
    nothing = jnp.zeros((len(jax.tree.leaves(x)[0]), network.simulator.dim))
    return robustness.trace(network, key, Simulations(nothing, x), num_samples)


def _paid(
    keys: Key[Array, " 3"], posterior: Posterior, num: int
) -> tuple[Float[np.ndarray, " N"], Coverage]:
    """-log q of fresh simulations, and coverage on them."""
    network, simulations = posterior.network, posterior.simulator.draws(keys[0], num)
    kept = np.flatnonzero(np.asarray(simulations.finite))
    rows = jax.tree.map(lambda leaf: leaf[kept], simulations)
    losses, draws = _scored(network, jax.random.split(keys[1], len(kept)), rows)
    return np.asarray(losses), coverage.central(keys[2], Joint(rows.theta, rows.x, draws))


@eqx.filter_jit
def _scored(
    network: Network, keys: Key[Array, " N"], rows: Simulations
) -> tuple[Float[Array, " N"], Float[Array, "N S D"]]:
    contexts = jax.vmap(network.summary)(rows.x)
    draws = jax.vmap(lambda key, context: network.sample(key, context, DRAWS))(keys, contexts)
    return -network.given(rows.theta, contexts), draws


def _side(found: Coverage) -> str:
    """What is off, if something is."""
    if found.p_value >= LEVEL:
        return ""
    worst = found.excess[np.argmin(found.p_values)]
    return "too wide" if worst > 0 else "too sure"
