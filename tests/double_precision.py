"""Every public sampler in double precision, on small models; run by `test_double_precision`.

`JAX_ENABLE_X64=1 python -m tests.double_precision` prints one JSON object: for every sampler of the
registry, and for what goes with them, what is wrong with it, or nothing.  Samplers are traced, for
that is where loops meet types that change; programs alike run in `make test-x64`.
"""

from __future__ import annotations

import functools
import json
import traceback
from collections.abc import Callable
from typing import Any

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax

import ppl
from amortized import fit
from amortized.strings import gflownet, guide
from models import any_order_tabular, tabular
from ppl.exact import enumerate_strings, optimal_twist
from ppl.rows import take_rows
from ppl.twists import twisted
from samplers import smc
from samplers.base import Cost
from samplers.canvas import diffusion, orders, tails, unmasking
from samplers.canvas import twists as canvas_twists
from samplers.draws import (
    adaptive_power,
    ancestral,
    fractured,
    low_temperature,
    scalable_power,
    stochastic_beam,
    thinking,
)
from samplers.latent import blocks, filtering, pmmh, smc2, smoothing, tempered
from samplers.latent import conditional as particle_gibbs
from samplers.mcmc import (
    chains,
    judges,
    multiple_try,
    parallel_tempering,
    power,
    pref_mh,
    qalign,
    quest,
    suffix,
    suffix_csmc,
    vgb,
)
from samplers.search import (
    abmcts,
    best_first,
    best_of_n,
    convergence,
    mur,
    online,
    phi_decoding,
    pools,
    priorities,
    rebase,
    reweighted,
    step_search,
    stopping,
    votes,
)
from samplers.smc import (
    annealed,
    bounds,
    branching,
    calibrated,
    conditional,
    distinct,
    entropic,
    importance,
    particle_filtering,
    pimh,
    power_smc,
    resample_move,
    sleeping,
)
from tests.helpers import z_score

KEY = jax.random.key(3)
MAX_TOKENS, EOS, NUM, REPLICAS = 3, 1, 4, 400
STEPS = ppl.Steps(every=1)
LADDER = np.asarray([1.0, 1.5])


def score(tokens: Any, length: Any) -> Any:
    """A reward as a user writes it: in double precision where that is on."""
    return 0.4 * length - 0.3 * (tokens[:, 0] == 2)


def share(tokens: Any, length: Any) -> Any:
    return jax.nn.sigmoid(score(tokens, length))


@functools.cache
def p() -> Any:
    return tabular.random_table(jax.random.key(12), 3, MAX_TOKENS, eos=EOS).given(
        [2], max_tokens=MAX_TOKENS
    )


@functools.cache
def unending() -> Any:
    """A model without a longest context."""
    return tabular.markov(jnp.full((3, 3), 1 / 3), eos=EOS).given([2], max_tokens=2)


@functools.cache
def target() -> Any:
    return p() ** 1.5 * ppl.reward(score)


@functools.cache
def valued() -> Any:
    """The target with exact values of prefixes."""
    return twisted(target(), optimal_twist(target()))


@functools.cache
def canvas() -> Any:
    return any_order_tabular.random_table(KEY, 3, 2, eos=EOS).canvas()


def canvases() -> Any:
    return unmasking.run(KEY, canvas(), num_particles=NUM).samples


@functools.cache
def starts() -> Any:
    """Strings for chains to start at."""
    return ancestral.run(KEY, p(), num_samples=NUM).sequences


def steps_of(kernel: Any, start: Any = None) -> Any:
    """The state and info of one step, of a kernel whose state keeps its types."""
    state = kernel.init(starts() if start is None else start)
    after, info = jax.eval_shape(kernel.step, KEY, state)
    before = jax.tree.map(lambda leaf: jnp.asarray(leaf).dtype, state)
    assert before == jax.tree.map(lambda leaf: leaf.dtype, after), before
    return after, info


# Latent variables.

GRID = jnp.asarray([0.2, 0.5, 0.3])
PRIOR = dist.Categorical(probs=GRID)
WALK = pmmh.propose(lambda theta: dist.Categorical(probs=jnp.ones((3, 3))[theta] / 3))
SYMBOLS = np.array([0, 1, 1])


def emission(theta: Any) -> filtering.StateSpace:
    """Two states, of which `theta` says how well they are seen."""
    moves, sees = jnp.asarray([[0.8, 0.2], [0.4, 0.6]]), GRID[theta]
    return filtering.StateSpace(
        lambda: dist.Categorical(probs=moves[0]),
        lambda t, x: dist.Categorical(probs=moves[x]),
        lambda t, x: dist.Bernoulli(probs=jnp.where(x == 0, sees, 1 - sees)),
    )


def filtered() -> filtering.Result:
    return filtering.run(KEY, emission(1), SYMBOLS, num_particles=NUM)


def paths() -> Any:
    return jnp.moveaxis(smoothing.trajectories(filtered().history), 0, 1)


def evidence(key: Any, theta: Any) -> Any:
    return filtering.run(key, emission(theta), SYMBOLS, num_particles=NUM).log_z


def regression(seen: Any) -> None:
    weight = numpyro.sample("weight", dist.Normal(0.0, 1.0))
    numpyro.sample("seen", dist.Normal(weight, 0.5), obs=seen)


def walk(log_density: Any, beta: Any) -> Any:
    return blackjax.additive_step_random_walk(
        log_density, lambda key, x: jax.random.normal(key, x.shape) / (1 + beta)
    )


def counting(target: Any, count: Any) -> None:
    speed = numpyro.sample("speed", dist.Gamma(2.0, 1.5))
    tokens = numpyro.sample("text", ppl.Text(target))
    numpyro.sample("count", dist.Poisson(speed * (0.2 + (tokens != EOS).sum())), obs=count)


def text_and_latent() -> Any:
    joint = blocks.joint(counting, p(), 3)
    return steps_of(blocks.kernel(joint), joint.start(KEY, num_chains=2))


KNOWN = {"log_prob": [-1.0, -2.0, -3.0, -4.0], "log_q": [-1.0, -2.0, -3.0, -4.0]}


def votes_on(pool: pools.Pool) -> dict[str, Callable[[], Any]]:
    """Every vote on a pool."""
    ways: dict[str, Callable[[Any, Any], Any]] = {
        "votes.best_of": lambda key, pool: votes.best_of(key, pool, 2),
        "votes.best_of_majority": lambda key, pool: votes.best_of_majority(key, pool, 0.2, 2),
        "votes.majority": votes.majority,
        "votes.majority_of_bests": votes.majority_of_bests,
        "votes.soft_best_of": lambda key, pool: votes.soft_best_of(key, pool, 0.5),
        "votes.vote": lambda key, pool: votes.vote(key, pool, pool.scores),
        "votes.weighted": votes.weighted,
        "reweighted.deep_conf": lambda key, pool: reweighted.deep_conf(key, pool, pool.scores),
        "reweighted.expected_utility": lambda key, pool: reweighted.expected_utility(
            key, pool, lambda one, other: jnp.float32(one == other)
        ),
        "reweighted.horvitz_thompson": reweighted.horvitz_thompson,
        "reweighted.perplexity_consistency": reweighted.perplexity_consistency,
    }
    return {f"search.{name}": functools.partial(way, KEY, pool) for name, way in ways.items()}


SAMPLERS: dict[str, Callable[[], Any]] = {
    "canvas.diffusion.run": lambda: diffusion.run(
        KEY, canvas(), num_samples=NUM, steps=2, solver=diffusion.trapezoid()
    ),
    "canvas.tails.kernel": lambda: steps_of(tails.kernel(canvas() ** 1.5), canvases()),
    "canvas.tails.reorder": lambda: steps_of(tails.reorder(canvas() ** 1.5), canvases()),
    "canvas.unmasking.process": lambda: unmasking.process(
        KEY,
        canvas() * ppl.reward(score),
        block=2,
        num_particles=NUM,
        order=orders.margin(),
        twist=canvas_twists.steering(canvas(), score),
    ),
    "canvas.unmasking.run": lambda: unmasking.run(KEY, canvas() ** 1.5, num_particles=NUM),
    "draws.adaptive_power.run": lambda: adaptive_power.run(
        KEY,
        p(),
        lambda key, target: low_temperature.run(key, target, num_samples=NUM),
        lambda x: np.asarray(x.length),
        num_batches=2,
    ),
    "draws.ancestral.run": lambda: ancestral.run(KEY, p(), num_samples=NUM),
    "draws.low_temperature.run": lambda: low_temperature.run(KEY, p() ** 2, num_samples=NUM),
    "draws.fractured.run": lambda: fractured.run(
        KEY, p(), [0], depths=[1, 2], num_thoughts=2, num_samples=2
    ),
    "draws.thinking.run": lambda: thinking.run(KEY, p(), [0], within=1, num_samples=NUM),
    "draws.scalable_power.full": lambda: scalable_power.full(KEY, p() ** 2, num_samples=2),
    "draws.scalable_power.run": lambda: scalable_power.run(
        KEY, p() ** 2, num_samples=2, num_candidates=2
    ),
    "draws.stochastic_beam.run": lambda: stochastic_beam.run(KEY, target(), num_samples=NUM),
    "latent.blocks.kernel": text_and_latent,
    "latent.conditional.kernel": lambda: steps_of(
        particle_gibbs.kernel(emission(1), SYMBOLS, num_particles=2, ancestor_sampling=True),
        paths(),
    ),
    "latent.conditional.run": lambda: particle_gibbs.run(
        KEY, emission(1), SYMBOLS, paths()[0], num_particles=2
    ),
    "latent.filtering.run": filtered,
    "latent.pmmh.kernel": lambda: steps_of(
        pmmh.kernel(evidence, PRIOR, WALK),
        PRIOR.sample(KEY, (3,)),
    ),
    "latent.smc2.adaptive": lambda: smc2.adaptive(
        KEY, emission, PRIOR, SYMBOLS, num_particles=NUM, num_states=2, proposal=WALK
    ),
    "latent.smc2.run": lambda: smc2.run(
        KEY, emission, PRIOR, SYMBOLS, times=[1], num_particles=NUM, num_states=2, proposal=WALK
    ),
    "latent.smoothing.backward_sample": lambda: smoothing.backward_sample(
        KEY, emission(1), filtered().history, num=NUM
    ),
    "latent.tempered.adaptive": lambda: tempered.adaptive(
        KEY, regression, 0.7, num_particles=8, max_stages=5
    ),
    "latent.tempered.run": lambda: tempered.run(
        KEY, regression, 0.7, ladder=[0.3, 1.0], kernel=walk, num_particles=8
    ),
    "mcmc.multiple_try.blocked_gibbs": lambda: steps_of(
        multiple_try.blocked_gibbs(target(), block=2, num_tries=2)
    ),
    "mcmc.multiple_try.kernel": lambda: steps_of(multiple_try.kernel(target(), num_tries=2)),
    "mcmc.multiple_try.token_replacement": lambda: steps_of(
        multiple_try.token_replacement(target())
    ),
    "mcmc.parallel_tempering.kernel": lambda: steps_of(parallel_tempering.kernel(target(), LADDER)),
    "mcmc.parallel_tempering.run": lambda: parallel_tempering.run(
        KEY, target(), LADDER, num_chains=2, block_size=2
    ),
    "mcmc.power.run": lambda: power.run(
        KEY, target(), num_chains=NUM, block_size=2, moves_per_block=2
    ),
    "mcmc.pref_mh.kernel": lambda: steps_of(
        pref_mh.kernel(p(), judges.bradley_terry(p(), score, num_votes=3))
    ),
    "mcmc.qalign.kernel": lambda: steps_of(qalign.kernel(p(), score, beta=0.7)),
    "mcmc.quest.kernel": lambda: steps_of(quest.kernel(p(), score, beta=0.7)),
    "mcmc.suffix.kernel": lambda: steps_of(suffix.kernel(target())),
    "mcmc.suffix_csmc.kernel": lambda: steps_of(suffix_csmc.kernel(target(), num_particles=2)),
    "mcmc.vgb.kernel": lambda: steps_of(vgb.kernel(valued())),
    "mcmc.vgb.run": lambda: vgb.run(KEY, valued(), num_chains=NUM, num_steps=20),
    **votes_on(pools.pool([0, 1, 0, 2], scores=[1.0, 2.0, 0.5, 0.1], **KNOWN)),
    "search.pools.draw": lambda: pools.draw(KEY, p(), num=NUM, answer=len, score=score),
    "search.online.run": lambda: online.run(
        KEY, p(), stopping.beta(0.9), answer=len, max_draws=2 * NUM, batch=NUM
    ),
    "search.best_of_n.run": lambda: best_of_n.run(KEY, target(), num_samples=NUM),
    "search.abmcts.run": lambda: abmcts.run(
        KEY, p(), share, num_calls=4, batch_size=2, posterior=abmcts.beta
    ),
    "search.abmcts.search": lambda: abmcts.search(
        KEY, jnp.zeros(1, jnp.int32), lambda key, x: (x + 1, Cost()), lambda x: 0.5 * x, num_calls=3
    ),
    "search.best_first.run": lambda: best_first.run(
        KEY, p(), priorities.astar(share), STEPS, width=2, capacity=8, max_expansions=4
    ),
    "search.convergence.run": lambda: convergence.run(
        KEY, p(), [0], STEPS, num=2, answer_tokens=1, num_samples=2
    ),
    "search.mur.run": lambda: mur.run(KEY, p(), share, STEPS, width=2),
    "search.phi_decoding.run": lambda: phi_decoding.run(
        KEY, p(), STEPS, num_beams=2, width=2, min_steps=1, max_steps=2
    ),
    "search.rebase.exact": lambda: rebase.exact(KEY, p(), share, STEPS, num_particles=NUM),
    "search.rebase.run": lambda: rebase.run(KEY, p(), share, STEPS, width=NUM),
    "search.step_search.beam": lambda: step_search.beam(
        KEY, p(), share, STEPS, num_beams=4, width=2
    ),
    "search.step_search.dvts": lambda: step_search.dvts(
        KEY, p(), share, STEPS, num_beams=4, width=2
    ),
    "smc.annealed.run": lambda: annealed.run(
        KEY, target(), np.asarray([0.5, 1.0]), num_particles=NUM
    ),
    "smc.branching.run": lambda: branching.run(
        KEY, target(), num_roots=2, num_particles=NUM, threshold=0.5
    ),
    "smc.bounds.run": lambda: bounds.run(KEY, target(), starts(), num_particles=2),
    "smc.conditional.kernel": lambda: steps_of(
        conditional.kernel(target(), num_particles=2, ancestor_sampling=True)
    ),
    "smc.conditional.run": lambda: conditional.run(
        KEY, target(), take_rows(starts(), jnp.arange(1)), num_particles=2
    ),
    "smc.entropic.published": lambda: entropic.published(KEY, p(), share, STEPS, num_particles=NUM),
    "smc.entropic.run": lambda: entropic.run(KEY, p(), share, STEPS, num_particles=NUM),
    "smc.calibrated.run": lambda: calibrated.run(
        KEY, p(), score, num_first=NUM, num_second=NUM, top=2
    ),
    "smc.importance.run": lambda: importance.run(KEY, target(), num_particles=NUM),
    "smc.particle_filtering.published": lambda: particle_filtering.published(
        KEY, p(), share, STEPS, num_particles=NUM
    ),
    "smc.particle_filtering.run": lambda: particle_filtering.run(
        KEY, p(), share, STEPS, num_particles=NUM
    ),
    "smc.pimh.kernel": lambda: steps_of(pimh.kernel(target(), num_particles=2)),
    "smc.power_smc.run": lambda: power_smc.run(KEY, p() ** 2, ramp=2, num_particles=NUM),
    "smc.resample_move.run": lambda: resample_move.run(
        KEY, target(), num_particles=NUM, block_size=2
    ),
    "smc.sleeping.run": lambda: sleeping.run(
        KEY, unending(), [[0], [2, 0]], num_thoughts=2, num_samples=2, max_tokens=2
    ),
    "smc.distinct.run": lambda: distinct.run(KEY, target(), num_particles=NUM),
    "smc.sequential.run": lambda: smc.run(KEY, target(), num_particles=NUM, threshold=0.5),
}


# What goes with the samplers.


def law_of(lm: Any, example: Any) -> Any:
    return ppl.Target(lm, lm.read(example["before"], jnp.int32(1)), MAX_TOKENS)


def posterior_of(lm: Any, example: Any) -> Any:
    return law_of(lm, example) * ppl.reward(score)


def trained() -> Any:
    """A few steps of a GFlowNet with a replay buffer."""
    task = gflownet.Task(p().lm, {"before": jnp.asarray([[2]])}, posterior_of, law_of)
    start = guide.full(tabular.table(jnp.zeros((tabular.num_prefixes(3, MAX_TOKENS), 3)), eos=EOS))
    training = gflownet.training(start, task, num=4, slots=4)
    return fit.run(KEY, training, optimizer=optax.adam(0.1), num_steps=4, progress=False)


def text() -> Any:
    """A text under NumPyro, drawn and scored."""
    with numpyro.handlers.seed(rng_seed=0):
        tokens = numpyro.sample("text", ppl.Text(p()), sample_shape=(5,))
    return {"tokens": tokens, "log_z": ppl.Text(target()).log_prob(tokens)}


def stopped() -> Any:
    """Every rule on a pool and in a loop."""
    pool = pools.pool(jnp.int32([0, 1, 0, -1]))
    rules = [stopping.beta(0.9), stopping.dirichlet(0.9), stopping.window(2), stopping.stable(2)]
    rules += [stopping.doubling(0.75), stopping.entropy(0.5), stopping.secretary(4)]
    rules += [stopping.evalue(0.05), stopping.evalue(0.05, 3), stopping.fixed(3)]

    def draw(key: Any, num: int) -> Any:
        return pool.answer[:num], pool.scores[:num], pool.length[:num]

    replayed = [stopping.replay(KEY, pool, rule, draws=[2], tokens=[3]) for rule in rules]
    live = [stopping.online(KEY, draw, rule, num_answers=2, max_draws=4, batch=2) for rule in rules]
    return (
        replayed,
        live,
        [rule.step(rule.init(2, 4), pool.answer[0], pool.scores[0]) for rule in rules],
    )


OTHERS: dict[str, Callable[[], Any]] = {
    "search.stopping": stopped,
    "amortized.fit.run": trained,
    "ppl.exact": lambda: enumerate_strings(target()).sequences,
    "ppl.Text": text,
}


# The report.

HOST = {
    "draws.adaptive_power.run",
    "mcmc.parallel_tempering.kernel",
    "mcmc.parallel_tempering.run",
    "mcmc.vgb.kernel",
    "search.online.run",
    "amortized.fit.run",
    "ppl.exact",
    "search.pools.draw",
}
"""What looks at values in between, and cannot be traced as a whole."""


def wrong_types(name: str, found: Any) -> list[str]:
    """Leaves that are not 32 bits wide; latent variables may be what their models make them."""
    wrong = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(found):
        where, kind = jax.tree_util.keystr(path), str(getattr(leaf, "dtype", ""))
        ours = not name.startswith("latent.") or where.endswith(("log_weights", "log_z"))
        if ours and kind.endswith("64") and not isinstance(leaf, np.ndarray):
            wrong.append(f"{where} is {kind}")
    return wrong


def fault(name: str, make: Callable[[], Any]) -> str:
    """What is wrong, or nothing."""
    try:
        return "; ".join(wrong_types(name, make() if name in HOST else jax.eval_shape(make)))
    except Exception:
        return traceback.format_exc(limit=-3)


def laws() -> dict[str, float]:
    """z-scores of what fixed samplers draw against the enumerated target."""
    exact = enumerate_strings(target())
    long = np.asarray(exact.sequences.length) >= 2
    share, total = float(exact.probs[long].sum()), float(np.exp(exact.log_z))

    @jax.jit
    @jax.vmap
    def smc_run(key: Any) -> tuple[Any, Any]:
        out = smc.run(key, target(), num_particles=NUM, threshold=0.5)
        weights = jnp.exp(out.log_z + out.log_weights)
        return weights.mean(), (weights * (out.sequences.length >= 2)).mean()

    z, mass = smc_run(jax.random.split(KEY, REPLICAS))
    powers = power.run(KEY, target(), num_chains=REPLICAS, block_size=2, moves_per_block=8)
    start = ancestral.run(KEY, p(), num_samples=REPLICAS).sequences
    suffixes = chains.run(KEY, suffix.kernel(target()), start, num_samples=1, thin=10).state
    return {
        "Z of smc": z_score(z, total)[0],
        "mass of smc": z_score(mass, share * total)[0],
        "share of power": z_score(powers.state.sequences.length >= 2, share)[0],
        "share of suffix": z_score(suffixes.sequences.length >= 2, share)[0],
    }


if __name__ == "__main__":
    # Not inside of a trace: what is made once is kept.
    starts(), valued()
    FAULTS = {name: fault(name, make) for name, make in (SAMPLERS | OTHERS).items()}
    print(json.dumps({"faults": FAULTS, "laws": laws()}))
