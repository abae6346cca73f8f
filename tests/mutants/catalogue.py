"""Subtle faults by hand, as exact replacements: what samplers get wrong, and operators do not make.

Each `old` occurs exactly once in its file (`test_mutants.py` says so where the code has moved on).
"""

from __future__ import annotations

from .mutant import ROOT, Mutant

CATALOGUE: tuple[tuple[str, str, str, str], ...] = (
    # file, what is wrong, old, new
    # Weights, resampling, evidence.
    (
        "samplers/base.py",
        "the mean weight is a sum",
        "jax.nn.logsumexp(p.log_weights) - jnp.log(p.log_weights.shape[0])",
        "jax.nn.logsumexp(p.log_weights)",
    ),
    (
        "samplers/base.py",
        "what was drawn from is not divided out",
        "log_weights + (banked.log_weights - jnp.log(num) - log_share)[ancestors]",
        "log_weights",
    ),
    (
        "samplers/base.py",
        "the ratio stays with the slot, not with the ancestor",
        "- jnp.log(num) - log_share)[ancestors]",
        "- jnp.log(num) - log_share)",
    ),
    (
        "samplers/base.py",
        "the depth of parts side by side adds up",
        "return dataclasses.replace(summed, depth=self.depth.max(0))",
        "return summed",
    ),
    (
        "samplers/population.py",
        "roots are forgotten at each resampling",
        "roots=run.roots[ancestors],",
        "roots=ancestors,",
    ),
    (
        "samplers/population.py",
        "roots stay where they were",
        "roots=run.roots[ancestors],",
        "roots=run.roots,",
    ),
    (
        "samplers/population.py",
        "a particle is counted as invalid again and again",
        "((no_number | invalid) & ~was_dead).sum(dtype=jnp.int32)",
        "(no_number | invalid).sum(dtype=jnp.int32)",
    ),
    (
        "samplers/population.py",
        "the ESS is that of the banked weights' logs",
        "return note(run, ess=ess(p.log_weights),",
        "return note(run, ess=ess(2 * p.log_weights),",
    ),
    (
        "samplers/population.py",
        "the trigger looks at the weights where ancestors are drawn from others",
        "when = (ess(selecting) < threshold",
        "when = (ess(run.particles.log_weights) < threshold",
    ),
    (
        "samplers/diagnostics.py",
        "shares by slot, not by root",
        "shares = _summed(roots, normalise(log_weights))\n    error",
        "shares = normalise(log_weights)\n    error",
    ),
    (
        "samplers/diagnostics.py",
        "one resampling too few in Lee and Whiteley's factor",
        "growth = (num_resamplings + 1) *",
        "growth = num_resamplings *",
    ),
    (
        "samplers/diagnostics.py",
        "rows of weight zero count where f is NaN",
        "jnp.sum(jnp.where(weights > 0, weights * f(rows), 0.0))",
        "jnp.sum(weights * f(rows))",
    ),
    # Resampling schemes.
    (
        "samplers/resampling.py",
        "strata of unequal size",
        "(jnp.arange(num, dtype=jnp.int32) + _uniform(key, num)) / num\n    )",
        "(jnp.arange(num, dtype=jnp.int32) + 0.5 * _uniform(key, num)) / num\n    )",
    ),
    (
        "samplers/resampling.py",
        "residual draws from the weights, not from the rest",
        "rest = _invert(expected - copies,",
        "rest = _invert(expected,",
    ),
    (
        "samplers/resampling.py",
        "killing keeps by W, not by W / max W",
        "keep = _uniform(keep_key, num) * jnp.max(weights) < weights",
        "keep = _uniform(keep_key, num) < weights",
    ),
    (
        "samplers/resampling.py",
        "a dead reference comes back",
        "jnp.where(jnp.isneginf(log_probs[-1]), ancestors.at[-1].set(ancestors[0]), ancestors)",
        "ancestors",
    ),
    (
        "samplers/resampling.py",
        "the winner's chance is the other's",
        "b_gains = u * (gain_a + gain_b) < gain_a",
        "b_gains = u * (gain_a + gain_b) < gain_b",
    ),
    # SMC over strings.
    (
        "samplers/smc/sequential.py",
        "missing support is averaged over the rows, ended ones too",
        "missing=x.missing.max(),",
        "missing=x.missing.mean(),",
    ),
    (
        "samplers/smc/sequential.py",
        "missing support of the last round",
        'run.rows["missing"].max()',
        'run.rows["missing"][-1]',
    ),
    (
        "samplers/smc/sequential.py",
        "what is invalid is not counted",
        "run = population.moved(run, x, dw, x.invalid)",
        "run = population.moved(run, x, dw)",
    ),
    (
        "samplers/smc/conditional.py",
        "the reference's ancestor is drawn by the rest alone",
        "start = body((x, jnp.where(fits, p.log_weights, -jnp.inf)))",
        "start = body((x, jnp.where(fits, 0 * p.log_weights, -jnp.inf)))",
    ),
    (
        "samplers/smc/conditional.py",
        "an ended particle fits any rest",
        "fits = x.active | (reference.length[0] <= t)",
        "fits = x.active | True",
    ),
    (
        "samplers/smc/conditional.py",
        "the reference's past is never drawn anew in the jitted chain",
        'options = {"num_particles": num_particles, "ancestor_sampling": ancestor_sampling}',
        'options = {"num_particles": num_particles, "ancestor_sampling": False}',
    ),
    (
        "samplers/smc/conditional.py",
        "the ancestor's key is that of the others",
        "own = multinomial(own_key,",
        "own = multinomial(others_key,",
    ),
    (
        "samplers/smc/pimh.py",
        "the start's evidence is that of a run that does not hold it",
        "around = conditional.around(target, how, num_particles)",
        "around = conditional.fresh(target, how, num_particles)",
    ),
    (
        "samplers/smc/pimh.py",
        "the evidence is made up at every step",
        "known = State(x.sequences, jnp.where(unknown, log_z, x.log_z))",
        "known = State(x.sequences, jnp.where(unknown.any(), log_z, x.log_z))",
    ),
    (
        "samplers/smc/pimh.py",
        "known evidence is asked for again",
        "unknown = jnp.isneginf(x.log_z)",
        "unknown = x.log_z < jnp.inf",
    ),
    (
        "samplers/smc/annealed.py",
        "Phi is not tempered in the moves",
        "x = dataclasses.replace(x, log_phi=scale(beta, x.log_phi))",
        "x = dataclasses.replace(x, log_phi=scale(beta * 0 + 1, x.log_phi))",
    ),
    (
        "samplers/smc/annealed.py",
        "the bound of Phi is not tempered",
        "beta * log_phi_max",
        "beta * beta * log_phi_max",
    ),
    (
        "samplers/smc/annealed.py",
        "weighed by the whole beta at every rung",
        "dw = scale(deltas[k], log_slope(target, x))",
        "dw = scale(betas[k], log_slope(target, x))",
    ),
    (
        "samplers/smc/resample_move.py",
        "every block weighs all tokens so far",
        "block = (positions >= before) & (positions < horizon)",
        "block = positions < horizon",
    ),
    (
        "samplers/smc/power_smc.py",
        "the exponent of the token before",
        "exponent(target, self.ramp, state + 1)",
        "exponent(target, self.ramp, state)",
    ),
    (
        "samplers/smc/bounds.py",
        "standard deviation with N degrees of freedom",
        "values.std(ddof=1)",
        "values.std(ddof=0)",
    ),
    # Strings.
    (
        "samplers/strings/costs.py",
        "a guide's passes are free",
        "forwards=passes + ticks * len(proposal.guides)",
        "forwards=passes",
    ),
    (
        "samplers/strings/growing.py",
        "the last factor is paid a token late",
        "(x.sequences.length == target.max_tokens - 1) & cut",
        "(x.sequences.length == target.max_tokens) & cut",
    ),
    (
        "samplers/strings/growing.py",
        "what the rows that do not move miss counts too",
        "jnp.maximum(x.missing, jnp.where(moving, missing, 0.0))",
        "jnp.maximum(x.missing, missing)",
    ),
    (
        "samplers/strings/growing.py",
        "a token that was given is scored without its norm",
        "chosen - jax.nn.logsumexp(law, axis=1))",
        "chosen)",
    ),
    (
        "samplers/strings/extending.py",
        "all tokens of a step have one key",
        "one(jax.random.fold_in(key, number), x, moving)",
        "one(key, x, moving)",
    ),
    (
        "samplers/strings/selection.py",
        "an ended string has something to look forward to",
        "p.log_weights + jnp.where(x.active, gain, 0.0)",
        "p.log_weights + gain",
    ),
    (
        "samplers/strings/cuts.py",
        "uniform over the tokens without their EOS",
        "positions = jnp.minimum(length + 1, horizon)",
        "positions = jnp.maximum(jnp.minimum(length, horizon), 1)",
    ),
    (
        "samplers/strings/proposals.py",
        "shares of the unnormalised laws",
        "log_normalised(law) + self.log_shares[k]",
        "law + self.log_shares[k]",
    ),
    (
        "samplers/strings/regeneration.py",
        "log q of a rung without its norm",
        "target.log_prob_factor(x.log_p) - log_norm)",
        "target.log_prob_factor(x.log_p))",
    ),
    (
        "samplers/strings/awrs.py",
        "soft factors count as a failed test",
        "return log_factor > -jnp.inf",
        "return log_factor >= 0",
    ),
    (
        "samplers/strings/awrs.py",
        "a token that passed is drawn without being put back",
        "remove(rest, drawn.token, going & (recursively | miss))",
        "remove(rest, drawn.token, going)",
    ),
    (
        "samplers/strings/awrs.py",
        "one trial too many",
        "jnp.maximum(x.passed + x.failed - 1, 1)",
        "jnp.maximum(x.passed + x.failed, 1)",
    ),
    # Chains.
    (
        "samplers/mcmc/suffix.py",
        "the law of the cut is left out",
        "gain += cut_law(cut, y.sequences.length, horizon) - cut_law(cut, x.sequences.length,"
        " horizon)",
        "gain += 0.0",
    ),
    (
        "samplers/mcmc/suffix.py",
        "early rejection counts Phi so far twice",
        "- jnp.where(rest, 0.0, y.log_phi).sum(1)",
        "- y.log_phi.sum(1)",
    ),
    (
        "samplers/mcmc/suffix.py",
        "early rejection as if nothing of Phi were to come",
        "(jnp.inf if looks_ahead else how.log_phi_max)",
        "(jnp.inf if looks_ahead else 0.0)",
    ),
    (
        "samplers/mcmc/suffix.py",
        "early rejection looks at the cut law of this length only",
        "log_most = jax.lax.cummax(possible, axis=1, reverse=True)",
        "log_most = possible",
    ),
    (
        "samplers/mcmc/suffix.py",
        "all moves of a plan have one key",
        "jax.random.split(jax.random.fold_in(chain, number), 3))(",
        "jax.random.split(jax.random.fold_in(chain, 0 * number), 3))(",
    ),
    (
        "samplers/mcmc/parallel_tempering.py",
        "rows keep log q of their old rung after a swap",
        "rows = at_rung(at_rungs(target, ladder, rung), state.rows, rung.reshape(-1))",
        "rows = at_rung(at_rungs(target, ladder, state.rung), state.rows, state.rung.reshape(-1))",
    ),
    (
        "samplers/mcmc/parallel_tempering.py",
        "moves at the powers that the rows began with",
        "inner = make(at_rungs(target, ladder, state.rung), Powered",
        "inner = make(at_rungs(target, ladder, 0 * state.rung), Powered",
    ),
    (
        "samplers/mcmc/parallel_tempering.py",
        "a swap exchanges one way only",
        "replica.at[k].set(high).at[k + 1].set(low)",
        "replica.at[k].set(high)",
    ),
    (
        "samplers/mcmc/multiple_try.py",
        "what is kept counts as drawn",
        "jnp.where(rest & anew, x.log_q, 0.0)",
        "jnp.where(rest, x.log_q, 0.0)",
    ),
    (
        "samplers/mcmc/pref_mh.py",
        "the plug-in estimate",
        "jnp.log(num_votes - kept + 1)",
        "jnp.log(jnp.maximum(num_votes - kept, 1))",
    ),
    (
        "samplers/kernels.py",
        "the same key draws and accepts",
        "move_key, accept_key = jax.random.split(key)\n    y, log_ratio = sample(move_key, x)",
        "move_key = accept_key = key\n    y, log_ratio = sample(move_key, x)",
    ),
    # Continuous latents.
    (
        "samplers/latent/filtering.py",
        "a guide is not divided out",
        "log_weight + log_prob_of(law, x) - log_prob_of(guided, x)",
        "log_weight + log_prob_of(law, x) - log_prob_of(law, x)",
    ),
    (
        "samplers/latent/filtering.py",
        "the look-ahead has the time after",
        "lookahead(run.rounds - 1, p.state, y)",
        "lookahead(run.rounds, p.state, y)",
    ),
    (
        "samplers/latent/filtering.py",
        "a missing observation asks the guide",
        "jnp.where(missing(y), b, a), drawn, blind)",
        "a, drawn, blind)",
    ),
    (
        "samplers/latent/conditional.py",
        "the reference's ancestor is drawn from what the others are drawn from",
        "p.log_weights + log_prob_of(law, rows)",
        "log_probs + log_prob_of(law, rows)",
    ),
    (
        "samplers/latent/conditional.py",
        "the reference's ancestor is drawn without its weight",
        "p.log_weights + log_prob_of(law, rows)",
        "jnp.where(jnp.isneginf(p.log_weights), -jnp.inf, 0.0) + log_prob_of(law, rows)",
    ),
    (
        "samplers/latent/conditional.py",
        "the reference's ancestor by the transition of the time before",
        "model.transition(run.rounds, p.state)",
        "model.transition(run.rounds - 1, p.state)",
    ),
    (
        "samplers/latent/conditional.py",
        "the reference has the weight of what its slot drew",
        "return y, move.assess(assess_key, x, y)",
        "return y, move.assess(assess_key, x, drawn)",
    ),
    (
        "samplers/latent/conditional.py",
        "the past of the reference is never drawn anew",
        "if ancestor_sampling:",
        "if False:",
    ),
    (
        "samplers/latent/smoothing.py",
        "the transition into the time itself",
        "model.transition(t + 1, x)",
        "model.transition(t, x)",
    ),
    (
        "samplers/latent/pmmh.py",
        "the Hastings factor is left out",
        "y.log_prior + y.log_z + log_back",
        "y.log_prior + y.log_z",
    ),
    (
        "samplers/latent/pmmh.py",
        "the proposal's factor the wrong way round",
        "back - there)",
        "there - back)",
    ),
    (
        "samplers/latent/tempered.py",
        "selected by the weights of the rung before",
        "run = population.advance(key, run, reweigh(beta - before))\n        run ="
        " population.record(run)",
        "run = population.record(run)\n        run = population.advance(key, run, reweigh(beta -"
        " before))",
    ),
    (
        "samplers/latent/rejuvenation.py",
        "copies of an ancestor side by side",
        "jnp.tile(leaf, each)",
        "jnp.repeat(leaf, each)",
    ),
    # What is inferred.
    (
        "ppl/target.py",
        "the horizon's factor replaces the token's",
        "jnp.where(cut, log_factor + at_end, log_factor)",
        "jnp.where(cut, at_end, log_factor)",
    ),
    (
        "ppl/target.py",
        "a second model is asked for EOS at the horizon",
        "jnp.where(used < self.space.max_tokens, log_probs[:, self.space.eos], 0.0)",
        "log_probs[:, self.space.eos]",
    ),
    (
        "ppl/target.py",
        "p * q forgets q's own potential",
        "lm_potential(other).within(self.space) * other.potential",
        "lm_potential(other).within(self.space)",
    ),
    (
        "ppl/potential.py",
        "what is forbidden comes back at power 0",
        "return jnp.where(finite, power * jnp.where(finite, log_factor, 0.0), log_factor)",
        "return jnp.where(power == 0, 0.0, power * log_factor)",
    ),
    (
        "ppl/token_automaton.py",
        "what the tokenizer lacks is allowed",
        "classes = jnp.pad(self.classes, (0, space.vocab_size - known), constant_values=FORBIDDEN)",
        "classes = jnp.pad(self.classes, (0, space.vocab_size - known), constant_values=2)",
    ),
    (
        "ppl/twists.py",
        "what was lent is not paid back",
        "_unless_dead(paid, owed + log_phi - paid)",
        "_unless_dead(paid, owed + log_phi)",
    ),
    (
        "ppl/judge.py",
        "EOS is read like a token",
        'used + (token != bound(self.space, "a judge").eos))',
        "used + 1)",
    ),
    (
        "ppl/steps.py",
        "the horizon is a boundary",
        "return state, ends & (token != space.eos) & (used != space.max_tokens)",
        "return state, ends & (token != space.eos)",
    ),
    (
        "ppl/draw.py",
        "both levels have one uniform",
        "local = _invert(u[:, 1],",
        "local = _invert(u[:, 0],",
    ),
)


EQUIVALENT: dict[tuple[str, str, str, str], str] = {
    ("samplers/mcmc/suffix_csmc.py", "_token", "rows.max_tokens - 1", "(rows.max_tokens)"): (
        "the bound is for rows that have ended, whose gain is not counted"
    ),
    ("samplers/mcmc/vgb.py", "_to_next_leaf", "0", "(1)"): (
        "the numbers of steps only tell their keys apart"
    ),
    (
        "samplers/smc/distinct.py",
        "_log_dropped",
        "jnp.where(chosen.present, chosen.index, single.size)",
        "(chosen.index)",
    ): "slots are left over only where all that weighs anything is chosen, and nothing is dropped",
    ("samplers/strings/extending.py", "_until.body", "1", "(2)"): (
        "the numbers of a step's tokens only tell their keys apart, and 0, 1, 3, 5 do"
    ),
}
"""Mutants of the operators that change nothing: (file, place, old, new) -> why."""


def exact() -> list[Mutant]:
    """The catalogue's mutants.

    Raises:
        ValueError: for an entry whose text does not occur exactly once.
    """
    return [_found(*entry) for entry in CATALOGUE]


def _found(file: str, what: str, old: str, new: str) -> Mutant:
    text = (ROOT / file).read_text()
    if text.count(old) != 1:
        raise ValueError(
            f"expected {old!r} exactly once in {file}, got {text.count(old)}; mend the catalogue's"
            f" entry '{what}'"
        )
    return Mutant(file, what, "catalogue", text.index(old), old, new)
