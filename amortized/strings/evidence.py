"""How good a learned sampler is: bounds on log Z from both sides, its effective sample size, what
it draws.

For a guide q and a target gamma = Z pi,

    ELBO = E_q[log gamma / q]  <=  E[log Z_IS]  <=  log Z  <=  EUBO = E_pi[log gamma / q]

with EUBO - ELBO = KL(q | pi) + KL(pi | q), and Z_IS the mean of gamma / q over N draws.

What a guide never draws none of its own numbers show: a guide that has lost half of the posterior
has a high ESS, and a log Z_IS that is too low by log 2 with a small error.  `coverage` looks from
the other side, by draws that are not the guide's; and the recommended proposal is a mixture of the
guide with the model (`proposals.mixture`).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from ppl import exact
from ppl.lm import LM
from ppl.pytrees import register_dataclass
from ppl.sequences import Sequences
from ppl.target import Target, check_target
from samplers import smc
from samplers.diagnostics import ess, log_z_std_error, normalise
from samplers.draws import ancestral
from samplers.results import Weighted
from samplers.smc import importance
from samplers.strings.proposals import LanguageModel, Law, Proposal

from . import rollouts

MISSED = 0.05
"""The share of the posterior that a guide may miss and still agree with the model."""


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Evidence:
    """Independent draws of a proposal, and what they weigh.

    sequences: N draws from q.  log_weights [N]: log gamma - log q, -inf where gamma is 0.
    """

    sequences: Sequences
    log_weights: Float[Array, " N"]

    @property
    def elbo(self) -> Float[Array, ""]:
        """Mean of log gamma / q; -inf if a draw has gamma = 0."""
        return self.log_weights.mean()

    @property
    def elbo_std_error(self) -> Float[Array, ""]:
        """Of that mean; infinite for one draw, and where the mean is -inf."""
        num = self.log_weights.shape[0]
        known = jnp.isfinite(self.log_weights).all() & (num > 1)
        return jnp.where(known, self.log_weights.std() / max(num - 1, 1) ** 0.5, jnp.inf)

    @property
    def log_z(self) -> Float[Array, ""]:
        """log of the mean of gamma / q: in expectation a lower bound, which rises to log
        Z with N.
        """
        return jax.nn.logsumexp(self.log_weights) - jnp.log(self.log_weights.shape[0])

    @property
    def log_z_std_error(self) -> Float[Array, ""]:
        """Of `log_z`, as far as the draws show; of what the guide never draws they show nothing."""
        slots = jnp.arange(self.log_weights.shape[0], dtype=jnp.int32)
        return log_z_std_error(self.log_weights, slots)

    @property
    def ess(self) -> Float[Array, ""]:
        """Effective sample size, over N: 1 for q = pi, and for any q on what it draws, however much
        it has lost (`coverage`).
        """
        return ess(self.log_weights) / self.log_weights.shape[0]


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Coverage:
    """Draws of a guide beside a run that does not depend on it.

    guide: N draws of the guide.  model: SMC with the model's own proposal.  missed []: the share of
    the posterior where pi / q > N, so that the guide is not to be expected to draw there, estimated
    from `model`.
    """

    guide: Evidence
    model: Weighted
    missed: Float[Array, ""]

    @property
    def log_z_gap(self) -> Float[Array, ""]:
        """By how much the guide's log Z is below the model's; -log(1 - missed) if nothing else is
        amiss.
        """
        return self.model.log_z - self.guide.log_z

    @property
    def gap_std_error(self) -> Float[Array, ""]:
        """Of that, as far as both runs show."""
        return jnp.hypot(self.model.log_z_std_error, self.guide.log_z_std_error)

    @property
    def agrees(self) -> Bool[Array, ""]:
        """Whether the guide misses less than a twentieth, and its log Z is not below the model's by
        three standard errors.
        """
        return (self.missed < MISSED) & ~(self.log_z_gap > 3 * self.gap_std_error)


def draws(
    key: PRNGKeyArray, target: Target, guide: Target | Proposal | Law, *, num_particles: int = 256
) -> Evidence:
    """Draw from a guide, and weigh for the target.

        evidence.draws(key, target, target.under(guide.lm)).ess / evidence.draws(key, target,
        bootstrap).ess

    says what the guide is worth as a proposal, over the base model, on what it draws; what it has
    lost, `coverage` says.

    Args:
        key: typed key.
        target: gamma.
        guide: a language model as a target over the same strings (its power and potential are
            obeyed, as in `proposals.LanguageModel`), or any proposal, e.g. `proposals.bootstrap`
            for the base model.
        num_particles: N.

    Raises:
        ValueError: if the guide is no target or over other strings, or num_particles < 1.
    """
    check_target(target)
    if isinstance(guide, LM):
        raise ValueError(
            "expected a guide over the target's strings, got an LM, which has no prompt and no"
            " horizon; pass target.under(lm)"
        )
    proposal = LanguageModel(guide) if isinstance(guide, Target) else guide
    if isinstance(guide, Target) and guide.is_language_model:
        jax.eval_shape(lambda: LanguageModel(guide).init(target, 1))  # for its errors
        # Strings first, then both models once over each: what is dear at a string's end is paid
        # once.
        x = ancestral.run(key, guide, num_samples=num_particles).sequences
        return Evidence(
            x, target.log_density(x.tokens, x.length) - guide.log_density(x.tokens, x.length)
        )
    out = importance.run(key, target, num_particles=num_particles, proposal=proposal)
    # All-dead populations: -inf + -inf, not NaN.
    return Evidence(out.sequences, out.log_weights + out.log_z)


def coverage(
    key: PRNGKeyArray, target: Target, guide: Target, *, num_particles: int = 256
) -> Coverage:
    """Check a guide's evidence against the model's own: does it draw wherever the posterior is?

        found = evidence.coverage(key, target, target.under(g.lm))
        found.agrees, found.missed, found.log_z_gap

    With properly weighted strings (x, W) from SMC under the default proposal,

        missed = sum_i W_i 1{ gamma(x_i) / (Z q(x_i)) > N }

    It finds what SMC finds: where the model's own draws do not reach a part of the posterior
    either, nothing tells of it.  Remedy: draw from a mixture of guide and model.

    Args:
        key: typed key.
        target: gamma.
        guide: q, `target.under(lm)`, times its constraints if it has some.
        num_particles: N, of both.

    Raises:
        ValueError: as `draws` and `eubo`.
    """
    _check_law(guide)
    guide_key, model_key = jax.random.split(key)
    own = draws(guide_key, target, guide, num_particles=num_particles)
    out = smc.run(model_key, target, num_particles=num_particles)
    x = out.sequences
    log_ratio = target.log_density(x.tokens, x.length) - _log_law(guide, x)
    unseen = log_ratio - jnp.maximum(out.log_z, own.log_z) > jnp.log(num_particles)
    return Coverage(own, out, jnp.where(unseen, normalise(out.log_weights), 0.0).sum())


def eubo(
    target: Target,
    guide: Target,
    posterior: Sequences,
    log_weights: Float[Array, " M"] | None = None,
) -> Float[Array, ""]:
    """E_pi[log gamma / q] from draws of the posterior: an upper bound on log Z, in expectation.

    Args:
        target: gamma.
        guide: q, `target.under(lm)`, times its constraints if it has some.
        posterior: M draws of pi, for example by enumeration, by rejection, or from SMC.
        log_weights: [M] of those draws; None: they count alike.  With weights from SMC the bound is
            as good as they are: consistent, not sure.

    Raises:
        ValueError: if the guide has a power, or a potential without look-ahead, whose normaliser is
            not known.
    """
    _check_law(guide)
    log_density = target.log_density(posterior.tokens, posterior.length)
    log_ratio = log_density - _log_law(guide, posterior)
    shares = normalise(jnp.zeros_like(log_density) if log_weights is None else log_weights)
    return jnp.where(shares > 0, shares * jnp.where(shares > 0, log_ratio, 0.0), 0.0).sum()


def _check_law(guide: Target) -> None:
    if not rollouts.has_law(guide):
        raise ValueError(
            "expected a guide that is a language model, or one times constraints, got one with a"
            " power or a potential whose normaliser is not known; pass target.under(lm) *"
            " ppl.support(target)"
        )


def _log_law(guide: Target, x: Sequences) -> Float[Array, " N"]:
    """log q of strings; constraints of the guide renormalise every token, as when it draws."""
    if guide.is_language_model:
        return guide.log_density(x.tokens, x.length)
    return rollouts.scores(guide, x).log_prob(x.length)


def total_variation(target: Target, guide: Target) -> float:
    """Distance of the guide's exact law from gamma / Z, by enumeration.

    Raises:
        ValueError: if there are too many strings to enumerate, none has positive density, or the
            guide is as in `eubo`.
    """
    _check_law(guide)
    truth = exact.enumerate_strings(target)
    q = np.exp(np.asarray(_log_law(guide, truth.sequences), np.float64))
    return float(0.5 * np.abs(truth.probs - q).sum())


# What it draws.


def distinct(x: Sequences) -> float:
    """Different strings, over N."""
    rows = np.column_stack([np.asarray(x.tokens), np.asarray(x.length)])
    return len(np.unique(rows, axis=0)) / len(rows)


def distinct_n(x: Sequences, n: int) -> float:
    """Different n-grams, over all n-grams of all strings; 0 if no string has n tokens (arXiv
    1510.03055).

    Raises:
        ValueError: if n < 1.
    """
    if n < 1:
        raise ValueError(f"expected n of at least 1, got {n}; 1 and 2 are usual")
    strings = _strings(x)
    grams = [tuple(string[i : i + n]) for string in strings for i in range(len(string) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def mode_coverage(x: Sequences, modes: Sequences) -> float:
    """The share of the given strings that were drawn.

    Raises:
        ValueError: if there are no modes.
    """
    wanted = {tuple(string) for string in _strings(modes)}
    if not wanted:
        raise ValueError(
            "expected modes to look for, got none; pass the strings whose mass you care for"
        )
    return len(wanted & {tuple(string) for string in _strings(x)}) / len(wanted)


def edit_diversity(x: Sequences) -> float:
    """Mean over all pairs of the edit distance of their tokens, divided by the longer one's length.

    0: all strings are equal; 1: no two have anything in common.  On the host, in N^2 T steps; of
    one string it is 0.
    """
    strings = _strings(x)
    pairs = [(a, b) for i, a in enumerate(strings) for b in strings[:i]]
    return (
        float(np.mean([edit_distance(a, b) / max(len(a), len(b), 1) for a, b in pairs]))
        if pairs
        else 0.0
    )


def edit_distance(a: list[int], b: list[int]) -> int:
    """Insertions, deletions and substitutions that turn one string into the other (Levenshtein)."""
    row = np.arange(len(b) + 1)
    columns = np.asarray(b)
    for i, token in enumerate(a):
        best = np.minimum(row[1:] + 1, row[:-1] + (columns != token))
        row = np.concatenate([[i + 1], best])
        # Insertions: the least of all cells to the left, each a step dearer than the one before.
        row = np.minimum.accumulate(row - np.arange(len(row))) + np.arange(len(row))
    return int(row[-1])


def _strings(x: Sequences) -> list[list[int]]:
    return [
        row[:n].tolist() for row, n in zip(np.asarray(x.tokens), np.asarray(x.length), strict=True)
    ]
