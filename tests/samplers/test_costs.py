"""What runs say they cost, against models that count their passes, rows and positions themselves.

Strings of the models here never end before the horizon, so that in most samplers all rows of a pass
are needed, and what the models count is what `Cost` has to say.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import ppl
from models import tabular
from ppl.any_order import AnyOrderFunctions, AnyOrderLM, no_data, sites_at
from ppl.lm import LM, LMFunctions, reorder_rows
from ppl.sequences import Sequences
from ppl.target import Target
from samplers import smc
from samplers.base import Cost
from samplers.canvas import diffusion, orders, unmasking
from samplers.draws import (
    ancestral,
    fractured,
    low_temperature,
    scalable_power,
    stochastic_beam,
    thinking,
)
from samplers.latent import filtering, pmmh, rejuvenation, smc2, tempered
from samplers.mcmc import (
    judges,
    multiple_try,
    parallel_tempering,
    power,
    pref_mh,
    suffix,
    suffix_csmc,
    vgb,
)
from samplers.search import best_first, best_of_n, convergence, mur, priorities, step_search
from samplers.smc import annealed, bounds, branching, conditional, pimh, resample_move
from samplers.strings import proposals, selection
from tests.helpers import EOS, VOCAB_SIZE
from tests.samplers.state_spaces import LINEAR, Y_MISSING

T, PROMPT, AFTER = 4, (2, 0, 3), (0, 3)
KEY = jax.random.key(5)
COUNTS: collections.Counter = collections.Counter()


# A model that counts.  A row that is fed EOS reads nothing that is needed: its string is empty.


def _note(name: str, positions: Any, fed: Any) -> None:
    needed = np.asarray(fed) != EOS
    COUNTS[name, "passes"] += 1
    COUNTS[name, "fed"] += int(needed.sum())
    COUNTS[name, "reads"] += int(
        (np.asarray(positions) * needed.reshape(len(needed), -1)[:, 0]).sum()
    )


def _init(name: str, params: Any, prefix: Any, num: int, max_tokens: int) -> Any:
    return jnp.zeros(num, jnp.int32)


def _prefill(name: str, params: Any, tokens: Any, length: Any) -> Any:
    return None, params[tokens[length - 1]]


def _step(name: str, params: Any, prefix: Any, cache: Any, token: Any) -> Any:
    jax.debug.callback(functools.partial(_note, name), prefix.length + cache + 1, token)
    return cache + 1, params[token]


def _advance(name: str, params: Any, prefix: Any, cache: Any, tokens: Any) -> Any:
    held = jnp.zeros(tokens.shape[0], jnp.int32) if cache is None else cache
    read = prefix.length + held + tokens.shape[1]
    jax.debug.callback(functools.partial(_note, name), read, tokens)
    return None if cache is None else cache + tokens.shape[1], params[tokens]


def _truncate(name: str, params: Any, cache: Any, length: Any) -> Any:
    return length.astype(jnp.int32)


FUNCTIONS = LMFunctions(_prefill, _init, _step, _truncate, reorder_rows, _advance)


@functools.cache
def counting(name: str) -> LM:
    """A Markov chain without an end, which counts under a name."""
    laws = tabular.random_laws(jax.random.key(len(name)), (VOCAB_SIZE,), VOCAB_SIZE, EOS)
    laws = laws.at[:, EOS].set(0.0) + 0.05 * (jnp.arange(VOCAB_SIZE) != EOS)
    logits = jnp.log(laws / laws.sum(1, keepdims=True))
    return LM(logits, name, FUNCTIONS, VOCAB_SIZE, EOS)


@functools.cache
def plain() -> Target:
    return counting("lm").given(PROMPT, max_tokens=T)


@functools.cache
def judged(every: int = 2) -> Target:
    """p^2 with a judge of steps: it reads every token, and what comes after at T / every ends."""
    verdict = ppl.judge(counting("judge"), (3, 2), AFTER, yes=3, no=0)
    return plain() ** 2 * ppl.step_scores(verdict, ppl.Steps(every=every))


def strings(num: int) -> Sequences:
    rows = jnp.arange(num * T, dtype=jnp.int32).reshape(num, T) % 3
    return Sequences(jnp.where(rows == EOS, 3, rows), jnp.full(num, T, jnp.int32))


def counted(run: Any) -> tuple[Any, dict[str, int]]:
    """What a run returns, and what the models counted meanwhile."""
    COUNTS.clear()
    out = jax.block_until_ready(run())
    jax.effects_barrier()
    found = {f"{name} {what}": n for (name, what), n in COUNTS.items()}
    return out, collections.Counter(found)


def check(
    cost: Cost | None, counts: dict[str, int], *, tokens: int, prompts: int, **other: int
) -> None:
    """The cost of a run of one chain of passes, whose start took `prompts` passes over prompts."""
    assert cost is not None
    passes = counts["lm passes"] + prompts
    expected = {
        "tokens": tokens,
        "forwards": passes,
        "depth": passes,
        "judge_tokens": counts["judge fed"],
        "kv_read": counts["lm reads"] + prompts * len(PROMPT),
        **other,
    }
    found = {name: int(getattr(cost, name)) for name in expected}
    assert found == expected, (found, expected, dict(counts))
    kinds = [leaf.dtype.kind for leaf in jax.tree.leaves(cost)]
    assert kinds == ["i", "i", "i", "i", "i", "f"]


N = 3
ALWAYS = {"num_particles": N, "threshold": 1.1}
ASKED = N * (T + 2 * len(AFTER))
"""What a judge of every second token reads of N strings."""


def at_one(cut: Any, length: Any, horizon: Any) -> Any:
    """Every cut is at 1, so that all chains go on together."""
    return jnp.where(cut == 1, 0.0, -jnp.inf) + 0.0 * (length + horizon)


RUNS: dict[str, tuple[Any, int, dict[str, int]]] = {
    # what runs, tokens, and what else is known of the cost
    "ancestral": (lambda: ancestral.run(KEY, plain(), num_samples=N), N * T, {}),
    "low_temperature": (lambda: low_temperature.run(KEY, plain() ** 2, num_samples=N), N * T, {}),
    "thinking": (lambda: thinking.run(KEY, plain(), [3], within=1, num_samples=N), N * T, {}),
    "fractured": (
        lambda: fractured.run(KEY, plain(), [3], depths=[1], num_thoughts=2, num_samples=2),
        2 + 4 * (T - 1),
        {},
    ),
    "scalable_power": (
        lambda: scalable_power.run(
            KEY, plain() ** 2, num_samples=2, num_candidates=2, num_rollouts=2
        ),
        2 * T + 8 * (3 + 2 + 1),
        {},
    ),
    "stochastic_beam": (
        lambda: stochastic_beam.run(KEY, judged(), num_samples=2),
        N * T,
        {"potential_calls": N * T, "judge_tokens": ASKED},
    ),
    "smc": (
        lambda: smc.run(KEY, judged(), **ALWAYS),
        N * T,
        {"potential_calls": N * T, "judge_tokens": ASKED},
    ),
    "next_token": (
        lambda: smc.run(KEY, judged(), selection=selection.next_token, **ALWAYS),
        N * T,
        {"potential_calls": N * T},
    ),
    "steps": (
        lambda: smc.run(KEY, judged(), steps=ppl.Steps(every=3), **ALWAYS),
        N * T,
        {"potential_calls": N * T},
    ),
    "blocks": (
        lambda: smc.run(KEY, plain() ** 2, num_particles=4, block_size=2),
        4 * T,
        {"depth": T, "potential_calls": 0},
    ),
    "branching": (  # one string, then two, then three
        lambda: branching.run(KEY, plain(), num_roots=1, num_particles=N, threshold=0.0),
        2 + 3 * (T - 1),
        {},
    ),
    "conditional": (
        lambda: conditional.run(KEY, judged(), strings(1), **ALWAYS),
        2 * T,
        {"potential_calls": N * T, "judge_tokens": ASKED},
    ),
    "ancestor_sampling": (
        lambda: conditional.run(KEY, plain() ** 2, strings(1), ancestor_sampling=True, **ALWAYS),
        2 * T,
        {},
    ),
    "resample_move": (
        lambda: resample_move.run(
            KEY, judged(), num_particles=2, block_size=2, num_moves=1, cut=at_one
        ),
        2 * (T + 1 + 3),
        {"potential_calls": 2 * (T + 2 + (1 + 1) + (1 + 3))},
    ),
    "annealed": (
        lambda: annealed.run(
            KEY, plain() ** 2, [0.5, 1.0], num_particles=2, num_moves=1, cut=at_one
        ),
        2 * (T + 2 * 3),
        {},
    ),
    "power": (
        lambda: power.run(
            KEY,
            plain() ** 2,
            num_chains=2,
            block_size=2,
            moves_per_block=1,
            cut=at_one,
            early_rejection=False,
        ),
        2 * (T + 1 + 3),
        {},
    ),
    "convergence": (  # a step, a look of two tokens, twice; closed by force; a token more
        lambda: convergence.run(
            KEY, plain(), [3], ppl.Steps(every=1), num=9, answer_tokens=1, num_samples=1
        ),
        2 * (1 + 2) + 2,
        {},
    ),
    "best_of_n": (
        lambda: best_of_n.run(KEY, judged(), num_samples=N),
        N * T,
        {"potential_calls": N * T, "judge_tokens": ASKED},
    ),
}
FAST = ("smc", "conditional", "best_of_n", "stochastic_beam")


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in RUNS]
)
def test_a_run_costs_what_its_models_count(name: str):
    run, tokens, other = RUNS[name]
    for target in (plain, judged):  # whose prompts are read here
        target()
    out, counts = counted(run)
    check(out.cost, counts, tokens=tokens, prompts=1, **other)


def test_a_guide_passes_and_reads_too():
    """It reads the last token as well, from which nothing is drawn."""
    plain()
    guide = proposals.LanguageModel(counting("guide").given((2, 0), max_tokens=T))
    out, counts = counted(lambda: smc.run(KEY, plain(), proposal=guide, **ALWAYS))
    assert (counts["lm passes"], counts["guide passes"]) == (T - 1, T)
    forwards, reads = 2 + T - 1 + T, 3 + 2 + counts["lm reads"] + counts["guide reads"]
    other = {"forwards": forwards, "depth": 1 + T, "kv_read": reads}
    check(out.cost, counts, tokens=N * T, prompts=1, **other)


C, LEFT = 2, T - 1
PAIRS = judges.pairwise(
    judges.pair_model(counting("judge"), (3, 2), (0,), AFTER, first=0, second=3), num_votes=2
)
CUT: dict[str, Any] = {"cut": at_one}
KERNELS: dict[str, tuple[Any, int, dict[str, int]]] = {
    # as RUNS, of a step of two chains; potentials are stepped to the cut again
    "suffix": (
        lambda: suffix.kernel(judged(), early_rejection=False, **CUT),
        C * LEFT,
        {"potential_calls": C * T},
    ),
    "multiple_try": (
        lambda: multiple_try.kernel(judged(), num_tries=2, **CUT),
        2 * C * LEFT,
        {"potential_calls": C + 2 * C * LEFT, "judge_tokens": C + 2 * C * (LEFT + 2 * len(AFTER))},
    ),
    "blocked_gibbs": (
        lambda: multiple_try.kernel(plain() ** 2, num_tries=2, block=1, **CUT),
        2 * C,
        {},
    ),
    "suffix_csmc": (
        lambda: suffix_csmc.kernel(judged(), num_particles=N, threshold=1.1, **CUT),
        C * (N - 1) * LEFT,
        {"potential_calls": C + C * N * LEFT},
    ),
    "pref_mh": (
        lambda: pref_mh.kernel(plain(), PAIRS, **CUT),
        C * LEFT,
        {"judge_tokens": C * 2 * (2 * T + 1 + len(AFTER))},
    ),
    "parallel_tempering": (
        lambda: parallel_tempering.kernel(
            plain() ** 2,
            [1, 2],
            make=lambda target, proposal: suffix_csmc.kernel(
                target, proposal=proposal, num_particles=2, **CUT
            ),
        ),
        2 * C * LEFT,
        {},
    ),
    "conditional": (
        lambda: conditional.kernel(judged(), **ALWAYS),
        C * (N - 1) * T,
        {"depth": LEFT, "potential_calls": C * N * T, "judge_tokens": C * ASKED},
    ),
    "pimh": (
        lambda: pimh.kernel(judged(), **ALWAYS),
        C * (2 * N - 1) * T,
        {"depth": 2 * LEFT, "potential_calls": 2 * C * N * T, "judge_tokens": 2 * C * ASKED},
    ),
}


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("suffix_csmc", "pref_mh") else pytest.param(name, marks=pytest.mark.slow)
        for name in KERNELS
    ],
)
def test_a_step_costs_what_its_models_count(name: str):
    make, tokens, other = KERNELS[name]
    kernel = make()
    state = jax.block_until_ready(kernel.init(strings(C)))
    (_, info), counts = counted(lambda: kernel.step(KEY, state))
    check(info.cost, counts, tokens=tokens, prompts=0, **other)
    assert int(info.tokens.sum()) == tokens


def test_bounds_read_the_prompt_once():
    plain()
    runs, target = 3, plain() ** 2
    out, counts = counted(
        lambda: bounds.run(KEY, target, strings(C), num_particles=N, num_runs=runs)
    )
    check(out.cost, counts, tokens=(runs * N + C * (N - 1)) * T, prompts=1, depth=T)
    assert out.log_z_lower.shape == (runs,) and out.log_z_upper.shape == (C,)


@pytest.mark.slow
def test_a_search_asks_the_model_once_for_each_token():
    plain()
    search = step_search.beam
    reward = lambda x, n: jax.nn.sigmoid(0.3 * (x == 2).sum(1) - 0.2 * n)  # noqa: E731
    run = lambda: search(KEY, plain(), reward, ppl.Steps(every=2), num_beams=4, width=2)  # noqa: E731
    out, counts = counted(run)
    check(out.cost, counts, tokens=4 * T, prompts=1, potential_calls=4 * T)


@pytest.mark.slow
def test_only_uncertain_steps_are_drawn_more_than_once():
    """Rows that wait are fed too, which the model counts and the cost does not."""
    plain()
    reward = lambda x, n: jax.nn.sigmoid(0.3 * (x == 2).sum(1) - 0.2 * n)  # noqa: E731
    run = lambda: mur.run(KEY, plain(), reward, ppl.Steps(every=1), width=2, gamma=1.0)  # noqa: E731
    out, counts = counted(run)
    fired = int(out.details["fired"].sum())
    assert 0 < fired < T - 1 and int(out.cost.tokens) == T + 2 * fired
    assert int(out.cost.forwards) == counts["lm passes"] + 1
    assert int(out.cost.potential_calls) == T + 2 * fired


@pytest.mark.slow
def test_a_queue_reads_nothing_twice():
    """Children share the pass of their parent, and the root's is made with the prompt's logits."""
    plain()
    reward = lambda x, n: jax.nn.sigmoid(0.3 * (x == 2).sum(1) - 0.2 * n)  # noqa: E731
    how = {"width": 3, "capacity": 12, "max_expansions": 5}
    run = lambda: best_first.run(  # noqa: E731
        KEY, plain(), priorities.greedy(reward), ppl.Steps(every=1), **how
    )
    out, counts = counted(run)
    scored = int(out.details["num_scored"])
    assert counts["lm passes"] >= int(out.details["expansions"])
    check(out.cost, counts, tokens=scored, prompts=1, potential_calls=scored)


def test_a_walk_reads_where_it_stands():
    """A walker at the root, or at a leaf, needs no pass; one that has gone back reads again."""
    plain()
    steps = 12
    out, counts = counted(lambda: vgb.run(KEY, plain() ** 2, num_chains=C, num_steps=steps))
    length = np.asarray(out.draws["sequences"].length)[:-1]
    inside = np.isneginf(np.asarray(out.draws["log_weights"]))[:-1] & (length > 0)
    reads = len(PROMPT) + int((inside * (len(PROMPT) + length)).sum())
    check(out.cost, counts, tokens=C * steps, prompts=1, kv_read=reads)
    assert counts["lm passes"] == steps and inside.any()


# Canvases: a pass is over all of them, and keeps nothing.


def _denoise(name: str, params: Any, prompt: Any, tokens: Any, masked: Any, at: Any) -> Any:
    jax.debug.callback(lambda open_: COUNTS.update({(name, "passes"): 1}), masked)
    return sites_at(jnp.broadcast_to(params, (*tokens.shape, params.shape[0])), at)


def canvas() -> ppl.CanvasTarget:
    functions = AnyOrderFunctions(no_data, _denoise)
    return AnyOrderLM(jnp.arange(4.0), "canvas", functions, 4, 3, EOS).canvas(length=5)


CANVASES: dict[str, tuple[Any, int, int]] = {
    # what runs, passes, and calls of the potential
    "run": (lambda p: unmasking.run(KEY, p * ppl.reward(lambda x, n: 0.1 * n)), 5, 32),
    "process": (lambda p: unmasking.process(KEY, p, block=2, order=orders.margin()), 3, 0),
    "trapezoid": (lambda p: diffusion.run(KEY, p, steps=4, solver=diffusion.trapezoid()), 7, 0),
}


@pytest.mark.parametrize(
    "name",
    [
        name if name == "process" else pytest.param(name, marks=pytest.mark.slow)
        for name in CANVASES
    ],
)
def test_a_canvas_costs_its_passes(name: str):
    run, passes, calls = CANVASES[name]
    target = canvas()
    out, counts = counted(lambda: run(target))
    assert counts["canvas passes"] == passes
    check_latent(out.cost, tokens=32 * 5, rounds=passes, calls=calls)


# Latents: nothing is read, and what is counted is plain.


def check_latent(cost: Cost, *, tokens: int, rounds: int, calls: int) -> None:
    found = {name: int(getattr(cost, name)) for name in Cost.__dataclass_fields__}
    expected = {"tokens": tokens, "forwards": rounds, "potential_calls": calls, "depth": rounds}
    assert found == {**expected, "judge_tokens": 0, "kv_read": 0}


def test_a_filter():
    out = filtering.run(KEY, LINEAR, Y_MISSING, num_particles=7)
    check_latent(out.cost, tokens=7 * 5, rounds=5, calls=7 * 4)


def drifting(drift: Any) -> filtering.StateSpace:
    return filtering.StateSpace(
        lambda: dist.Normal(drift, 1.0),
        lambda t, x: dist.Normal(drift + 0.5 * x, 1.0),
        lambda t, x: dist.Normal(x, 1.0),
    )


SEEN = np.asarray([0.3, np.nan, 1.0, -0.4])
PRIOR, MOVE = dist.Normal(0.0, 1.0), pmmh.propose(lambda drift: dist.Normal(drift, 0.3))


@pytest.mark.slow
def test_pmmh_counts_what_its_filters_count():
    def run(key: Any, drift: Any) -> Any:
        return filtering.run(key, drifting(drift), SEEN, num_particles=3)

    kernel = pmmh.kernel(run, PRIOR, MOVE)
    _, info = jax.jit(kernel.step)(KEY, kernel.init(jnp.zeros(C)))
    whole = dataclasses.replace(info.cost, forwards=info.cost.forwards // C)
    check_latent(whole, tokens=C * 12, rounds=4, calls=C * 9)
    np.testing.assert_array_equal(info.tokens, [12, 12])


@pytest.mark.slow
def test_smc2_runs_its_filters_again_where_it_moves():
    out = smc2.run(
        KEY,
        drifting,
        PRIOR,
        SEEN,
        times=[2],
        proposal=MOVE,
        num_particles=5,
        num_states=3,
        num_moves=2,
    )
    rounds = 4 + 2 * 3
    check_latent(out.cost, tokens=15 * rounds, rounds=rounds, calls=15 * (3 + 2 * 2))


@pytest.mark.slow
def test_tempered_smc():
    def model(seen: Any) -> None:
        mean = numpyro.sample("mean", dist.Normal(0.0, 1.0))
        numpyro.sample("seen", dist.Normal(mean, 1.0), obs=seen)

    walk = rejuvenation.random_walk()
    out = tempered.adaptive(
        KEY, model, jnp.float32(0.4), kernel=walk, num_particles=6, num_steps=3, max_stages=3
    )
    stages = int(out.rounds)
    check_latent(out.cost, tokens=0, rounds=3 * stages, calls=6 * (1 + stages * (3 + 2)))
