"""Diffusion samplers: their laws by transition matrices over all canvases, and how far these are
from the model's.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ppl
from models import any_order_tabular as tabular
from ppl.canvas import CanvasTarget
from samplers.canvas import diffusion, orders, unmasking
from samplers.canvas.diffusion import Site

from .enumeration import paths

KEY = jax.random.key(3)
L, V = 4, 2
THETA, ETA = 0.4, 0.1


@functools.cache
def model(seed: int = 0, length: int = L) -> CanvasTarget:
    return tabular.random_joint(jax.random.key(seed), length, V).canvas()


@functools.cache
def canvases(length: int = L) -> Site:
    every = jnp.asarray(list(itertools.product(range(V + 1), repeat=length)), jnp.int32)
    return Site(every, every == V, jnp.zeros(every.shape, jnp.int32), jnp.zeros(every.shape))


def site_laws(d: np.ndarray, x: Site, reveal: Any, remask: float = 0.0) -> np.ndarray:
    """The law [C, L, V + 1] of every site after a step, MASK being V."""
    ids, masked = np.arange(V + 1), np.asarray(x.masked)[:, :, None]
    reveal = np.broadcast_to(reveal, masked.shape[:2])[:, :, None]
    shown = np.where(ids == V, 1 - reveal, reveal * d)
    kept = (1 - remask) * (ids == np.asarray(x.tokens)[:, :, None]) + remask * (ids == V)
    return np.where(masked, shown, kept)


def second_half(d: np.ndarray, d_before: np.ndarray, x: Site, hours: float) -> np.ndarray:
    """Rates (a1 d - a2 d_before)_+ for the rest of a trapezoid step."""
    a1 = 1 / (2 * THETA * (1 - THETA))
    rates = np.maximum(a1 * d - (a1 - 1) * d_before, 0)
    total = rates.sum(2)
    law = rates / np.where(total > 0, total, 1)[:, :, None]
    return site_laws(law, x, 1 - np.exp(-total * (1 - THETA) * hours))


def matrix(p: np.ndarray, after: np.ndarray) -> np.ndarray:
    """The probability of every canvas under site laws [C, L, V + 1]."""
    return np.prod([p[:, i][:, after[:, i]] for i in range(after.shape[1])], axis=0)


def final_law(target: CanvasTarget, steps: int, solver: str) -> np.ndarray:
    """The law [V ** L] of whole canvases, by the transition matrices of all steps."""
    x = canvases(target.length)
    after = np.asarray(x.tokens)
    law = (after == V).all(1).astype(float)
    d = np.exp(np.asarray(target.denoise(x.tokens, x.masked), np.float64))
    for k in range(steps):
        m = [1 - k / steps, 1 - (k + 1) / steps]
        if solver == "trapezoid":  # two passes for a step, but one for the last
            m = [1 - 2 * k / (2 * steps - 1), max(1 - 2 * (k + 1) / (2 * steps - 1), 0)]
        if solver == "trapezoid" and m[1] > 0:
            hours = math.log(m[0] / m[1])
            middle = law[:, None] * matrix(site_laws(d, x, 1 - math.exp(-THETA * hours)), after)
            law = np.zeros(len(law))
            for c in np.flatnonzero(middle.sum(1)):
                law += middle[c] @ matrix(second_half(d, d[c], x, hours), after)
            continue
        remask = min(ETA, m[1] / max(1 - m[0], 1e-9), 1) if solver == "remasking" else 0.0
        reveal = ((1 - m[1]) - (1 - remask) * (1 - m[0])) / m[0]
        law = law @ matrix(site_laws(d, x, reveal, remask), after)
    whole = (after != V).all(1)
    assert law[~whole].sum() < 1e-6
    return law[whole]


def joint(target: CanvasTarget) -> np.ndarray:
    p = np.exp(np.asarray(target.lm.params, np.float64)).ravel()
    return p / p.sum()


def fixed_law(target: CanvasTarget, block: int) -> np.ndarray:
    law = np.zeros((V,) * target.length)
    for (_, x), q in paths(target, lambda d: np.zeros(len(d)), block).items():
        law[x] += q
    return law.ravel()


def far(law: np.ndarray, target: CanvasTarget) -> float:
    return 0.5 * float(np.abs(law - joint(target)).sum())


SOLVERS = {
    "ancestral": diffusion.ancestral,
    "trapezoid": diffusion.trapezoid(THETA),
    "remasking": diffusion.remasking(ETA),
}


@pytest.mark.parametrize(
    "name",
    [n if n == "trapezoid" else pytest.param(n, marks=pytest.mark.slow) for n in SOLVERS],
)
def test_draws_have_the_law_of_the_transition_matrices(name: str):
    num, steps, target = 20_000, 3, model()
    out = diffusion.run(KEY, target, num_samples=num, steps=steps, solver=SOLVERS[name])
    law = final_law(target, steps, name)
    assert law.sum() == pytest.approx(1, abs=1e-5)
    index = np.asarray(out.samples.tokens) @ V ** np.arange(L - 1, -1, -1)
    counts = np.bincount(index, minlength=V**L)
    z = (counts - num * law) / np.sqrt(num * law * (1 - law))
    assert np.abs(z).max() < 5
    # A fault in the second stage would be of this size.
    assert far(law, target) > 0.01
    assert int(out.cost.forwards) == (2 * steps - 1 if name == "trapezoid" else steps)
    assert not bool(out.samples.masked.any())
    if name != "trapezoid":
        # The schedule holds: the last step reveals a third, also of what was masked again.
        assert np.mean(np.asarray(out.samples.rank) == 2) == pytest.approx(1 / 3, abs=0.01)
        return
    other = final_law(target, steps, "ancestral")
    z = (counts - num * other) / np.sqrt(num * other * (1 - other))
    assert np.abs(z).max() > 8


def test_one_site_at_a_time_is_exact_and_more_are_not():
    target = model()
    assert far(fixed_law(target, 1), target) < 1e-6
    tv = {block: far(fixed_law(target, block), target) for block in (2, 4)}
    assert 0.02 < tv[2] < tv[4]


def test_more_steps_come_nearer():
    """And remasking stays behind where nothing is to be mended."""
    target = model()
    tv = {
        (name, steps): far(final_law(target, steps, name), target)
        for name in ("ancestral", "remasking")
        for steps in (2, 8, 32)
    }
    for name in ("ancestral", "remasking"):
        assert tv[name, 2] > tv[name, 8] > tv[name, 32]
    assert tv["ancestral", 32] < 0.03 and tv["remasking", 32] > tv["ancestral", 32]


@pytest.mark.slow
def test_what_a_pass_buys():
    """At three passes over five sites blocks of fixed size are nearest, then the trapezoid; at five
    passes the trapezoid is ahead of ancestral sampling, and one site at a time exact.
    """
    seeds, found = range(3), {}
    for seed in seeds:
        target = model(seed, 5)
        for name, steps in (("ancestral", 3), ("ancestral", 5), ("trapezoid", 2), ("trapezoid", 3)):
            found[seed, name, steps] = far(final_law(target, steps, name), target)
        found[seed, "fixed", 3] = far(fixed_law(target, 2), target)
    mean = {
        how: float(np.mean([found[seed, *how] for seed in seeds]))
        for how in {key[1:] for key in found}
    }
    assert mean["fixed", 3] < mean["trapezoid", 2] < 0.8 * mean["ancestral", 3]
    assert mean["trapezoid", 3] < 0.7 * mean["ancestral", 5]


@pytest.mark.slow
def test_sudoku():
    """One site at a time every grid is right, in any order; two at a time many are wrong, and
    confident sites are neighbours: the order mends nothing where d is right.
    """
    target, num = tabular.latin4().canvas(), 600
    grids = {tuple(grid) for grid in tabular.sudokus().tolist()}
    valid = {}
    for name, order in {"uniform": orders.uniform, "margin": orders.margin()}.items():
        for block in (1, 2):
            out = unmasking.process(KEY, target, block=block, num_particles=num, order=order)
            rows = np.asarray(out.samples.tokens).tolist()
            valid[name, block] = sum(tuple(row) in grids for row in rows) / num
    assert valid["uniform", 1] == valid["margin", 1] == 1
    assert abs(valid["uniform", 2] - 0.62) < 0.1 and valid["margin", 2] < valid["uniform", 2]


def test_given_sites_stay():
    """Also where open ones are masked again."""
    target, solver = model().lm.canvas(given={1: 1}), SOLVERS["remasking"]
    x = diffusion.run(KEY, target, num_samples=50, steps=3, solver=solver).samples
    assert (np.asarray(x.tokens[:, 1]) == 1).all() and (np.asarray(x.rank[:, 1]) == -1).all()


BAD = {
    "target": (lambda: diffusion.run(KEY, model() ** 2), "a plain model"),
    "tilt": (
        lambda: diffusion.run(KEY, model() * ppl.reward(lambda x, n: 0.1 * n)),
        "samplers.canvas.unmasking",
    ),
    "steps": (lambda: diffusion.run(KEY, model(), steps=0), "steps to be a whole"),
    "theta": (lambda: diffusion.trapezoid(1.0), r"theta in \(0, 1\)"),
    "eta": (lambda: diffusion.remasking(0.0), r"eta in \(0, 1\)"),
}


@pytest.mark.bad_input
@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str):
    make, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        make()
