# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Power sampling: MCMC over texts
#
# $p(x)^\alpha$ with $\alpha > 1$ prefers the texts that the model itself finds likely *as a whole*. Low temperature is
# something else: it prefers likely *tokens*, one at a time, and does not know what will follow. This notebook samples
# from $p^\alpha$ by Markov chains that redraw the end of a text and accept or reject it, looks at how well they mix,
# and composes them with each other and with SMC.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from rich.console import Console

import models
import ppl
from experiments import compilation
from experiments.showing import chain_figures, chain_report
from models import marginals, tabular
from samplers import kernels
from samplers.draws import low_temperature
from samplers.mcmc import chains, multiple_try, parallel_tempering, power, suffix
from samplers.mcmc import diagnostics as chain_diagnostics
from samplers.smc import conditional, power_smc
from samplers.strings import cuts, ladders

compilation.use_cache()  # compiled programs are kept, so a second run is quicker

# %% [markdown]
# ## 1. Not low temperature
#
# Four texts of two letters. After `a` one continuation is almost certain; after `b` two are equally likely. Low
# temperature picks `b` first, because `b` is likelier; the power prefers `aa`, the likeliest text.

# %%
lm = tabular.markov(
    [
        [0.95, 0.05, 0.00, 0.00],  # after a
        [0.50, 0.50, 0.00, 0.00],  # after b
        [0.40, 0.60, 0.00, 0.00],  # at the start
        [0.00, 0.00, 0.00, 1.00],
    ],
    eos=3,
)
p = lm.given([2], max_tokens=2)
exact = ppl.exact.enumerate_strings(p**4)
some = exact.probs > 0
names = ["".join("ab"[t] for t in row) for row in np.asarray(exact.sequences.tokens)[some]]
cold = low_temperature.run(jax.random.key(0), p**4, num_samples=20_000)
mh = power.run(jax.random.key(0), p**4, num_chains=20_000, block_size=1, moves_per_block=30)
laws = {
    "p": ppl.exact.enumerate_strings(p).probs,
    "temperature 1/4": exact.law(cold.sequences.tokens, jnp.zeros(20_000)),
    "power.run": exact.law(mh.sequences.tokens, jnp.zeros(20_000)),
    "p^4, exact": exact.probs,
}
figure, axes = plt.subplots(figsize=(7, 2.6), layout="constrained")
for i, (name, law) in enumerate(laws.items()):
    axes.bar(np.arange(len(names)) + 0.2 * (i - 1.5), law[some], width=0.18, label=name)
axes.set(xticks=range(len(names)), xticklabels=names, ylabel="probability")
axes.legend(frameon=False, loc="upper center")
plt.show()

# %% [markdown]
# ## 2. Chains on a real model
#
# `power.run` is Algorithm 1 of arXiv 2510.14901: texts grow by blocks, and after each block a number of moves redraw
# them from a random cut on. All chains run in one program, each with a cut, a length and a pace of its own; a prefix is
# never read again, and a proposal that cannot be accepted any more is stopped (`rejected_early`).

# %%
lm, tok = models.load("smollm2-135m")
p = lm.given(tok.chat("Why is the sky blue? Answer in one short sentence."), max_tokens=32)
out = power.run(jax.random.key(0), p**4, num_chains=4, block_size=16, moves_per_block=5)
for i in range(4):
    print(
        f"log p = {out.log_prob[i]:6.1f}  {tok.decode(out.sequences.tokens[i, : out.sequences.length[i]])!r}"
    )
print(
    f"accepted {out.info.accepted.mean():.2f}, "
    f"stopped early {out.info.details['rejected_early'].mean():.2f}, {out.cost}"
)

# %% [markdown]
# What the model writes by itself is much less likely:

# %%
alone = low_temperature.run(jax.random.key(1), p**1, num_samples=4)
for i in range(4):
    print(
        f"log p = {alone.log_prob[i]:6.1f}  {tok.decode(alone.sequences.tokens[i, : alone.sequences.length[i]])!r}"
    )

# %% [markdown]
# The kernel goes on from there, for as long as we like, and with any target: here the answer must not name light.

# %%
no_light = p**4 * ppl.banned(
    [i for i, b in enumerate(tok.token_bytes) if b and b"light" in b.lower()]
)
start = power.run(
    jax.random.key(2), no_light, num_chains=4, block_size=16, moves_per_block=2, log_phi_max=0.0
)
kernel = suffix.kernel(no_light, log_phi_max=0.0)
with chain_report.bar(Console()) as watch:
    found = chains.run(jax.random.key(3), kernel, start.sequences, num_samples=8, watch=watch)
Console().print(chain_report.table(found))
last = found.draws["sequences"]
print(tok.decode(last.tokens[-1, 0, : last.length[-1, 0]]))

# %% [markdown]
# Twenty draws of four chains do not mix on texts, and the table says so. What does, and when? For that we need a model
# whose truth is known.

# %% [markdown]
# ## 3. How well do they mix?
#
# A Markov chain over fifty tokens whose texts run to thirty: far too many to list, but a product of matrices gives
# everything about $p^\alpha$. The same start, texts drawn from $p$, and 400 steps of each kernel. Here $p^2$ is mostly
# on short texts, while proposals from $p^2$, token by token, hardly ever end: plain moves need luck. A cut uniform over
# the thirty positions falls beyond the end of a short text, and does nothing there; a cut uniform in the text pays for
# that in the acceptance ratio.

# %%
logits = 1.5 * jax.random.normal(jax.random.key(21), (50, 50))
among = jax.nn.softmax(jnp.where(jnp.arange(50) == 0, -jnp.inf, logits))
wordy = tabular.markov(jnp.where(jnp.arange(50) == 0, 0.03, 0.97 * among), eos=0)
p = wordy.given([1], max_tokens=30)
target = p**2
step = 1e-3
truth = (
    marginals.markov_log_z(wordy, [1], 30, 2 + step)
    - marginals.markov_log_z(wordy, [1], 30, 2 - step)
) / (2 * step)
x = low_temperature.run(jax.random.key(4), p**1, num_samples=16).sequences
ladder, inside = ladders.geometric(1, 2, 4), cuts.uniform_in_length
compared = {
    "suffix": suffix.kernel(target),
    "suffix, cuts in the text": suffix.kernel(target, cut=inside),
    "8 tries, cuts in the text": multiple_try.kernel(target, num_tries=8, cut=inside),
    "tempering, cuts in the text": parallel_tempering.kernel(
        target, ladder, make=parallel_tempering.suffix_moves(2, cut=inside)
    ),
}
runs = {
    name: chains.run(jax.random.key(5), of, x, num_samples=400) for name, of in compared.items()
}
print(f"{'exact':27} E[log p] = {truth:.2f}")
for name, run in runs.items():
    log_p = run.draws["log_prob"][200:]
    row = chain_diagnostics.summary({"log p": log_p})[0]
    print(
        f"{name:27} E[log p] = {row.mean:.2f} ± {row.mcse:.2f}   R-hat {row.r_hat:.3f}   tokens {run.cost.tokens:,}"
    )

# %% [markdown]
# Suffix moves change the beginning of a text seldom, for the whole rest must be redrawn and accepted at once:

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(12, 2.8), layout="constrained")
chosen = runs["suffix, cuts in the text"]
chain_figures.acceptance_by_cut(chosen, axes=left)
axes = chain_figures.trace(
    chosen.draws["log_prob"], "log p, suffix moves with cuts in the text", axes=right
)

# %% [markdown]
# Tempering lets texts move where moving is easy, at a low power, and carries them to the wanted one. A swap asks for no
# pass of the model. Each line is a replica on its way through the ladder:

# %%
tempered = chains.run(
    jax.random.key(6),
    compared["tempering, cuts in the text"],
    x,
    num_samples=150,
    collect=lambda state: {"log_prob": state.log_prob, "rung": state.rung},
)
print("swaps", np.round(chain_diagnostics.swap_acceptance(tempered.draws["rung"]), 2))
print(
    "round trips per replica", chain_diagnostics.round_trips(tempered.draws["rung"]).mean().round(1)
)
axes = chain_figures.replicas(tempered.draws["rung"])

# %% [markdown]
# ## 4. Weights, evidence, and kernels made of kernels
#
# Power-SMC has the same target, and gives log Z besides:

# %%
weighted = power_smc.run(jax.random.key(7), target, num_particles=256, ramp=15)
print(f"log Z = {weighted.log_z:.2f} ± {weighted.log_z_std_error:.2f}")
print(f"exact   {marginals.markov_log_z(wordy, [1], 30, 2.0):.2f}")

# %% [markdown]
# Kernels that leave one target invariant can be taken in turn: a suffix move, then a block of three tokens in the
# middle redrawn with eight tries, the rest kept. And a sampler can be a move: conditional SMC, in which Power-SMC's
# particles meet the chain's own text.

# %%
turns = kernels.cycle(
    suffix.kernel(target, cut=inside), multiple_try.kernel(target, num_tries=8, block=3, cut=inside)
)
gibbs = conditional.kernel(target, num_particles=16, batch_size=16, **power_smc.options(15))
for name, kernel in {"cycle": turns, "particle Gibbs": gibbs}.items():
    run = chains.run(jax.random.key(8), kernel, x, num_samples=100)
    strings = run.draws["sequences"]
    log_p = np.stack(
        [p.log_density(strings.tokens[s], strings.length[s]) for s in range(20, 100, 8)]
    )
    print(f"{name:15} E[log p] = {log_p.mean():.2f}   (exact {truth:.2f})")
