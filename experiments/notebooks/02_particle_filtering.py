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
# # Particle filtering with process rewards
#
# A *process reward* judges a text while it is being written: after a line, a sentence, every eight tokens. Best-of-n
# asks it only at the end, when it is too late. Particle filtering asks it at every step, drops the texts that go
# wrong, and copies those that go well.
#
# Done exactly it is inference. A score $s$ of whole texts makes a target
#
# $$\gamma(x) = p(x \mid \text{prompt})\; s(x),$$
#
# and the scores on the way, $s(x_{1:t})$, enter as ratios, $s(x_{1:t'}) / s(x_{1:t})$, whose product is $s(x)$. So what
# the judge thinks on the way decides how well the particles are spent, and never what they stand for.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import models
import ppl
from experiments import compilation
from experiments.showing import figures, view
from models import tabular
from samplers import diagnostics, smc
from samplers.search import best_of_n
from samplers.smc import bounds, conditional, particle_filtering
from samplers.strings import selection

compilation.use_cache()  # compiled programs are kept, so a second run is quicker

# %% [markdown]
# ## 1. A reward on the way
#
# The wish: a sentence about the sea without the letter `e`, or nearly. Every `e` costs 1.2 of log-score,
# and the judge looks after every four tokens. Any Python function of the text will do, and so would a jax function or a
# language model (`ppl.judge`).

# %%
lm, tok = models.load("smollm2-135m")
steps = ppl.Steps(every=4)


def few_e(text: str) -> float:
    return -1.2 * text.count("e")


p = lm.given(tok.chat("Write one short sentence about the sea."), max_tokens=16) * ppl.min_tokens(
    10
)
target = p * ppl.step_scores(ppl.python(few_e, tok), steps)
out = smc.run(jax.random.key(0), target, num_particles=24, steps=steps, history=True)
ppl.table(out, tok, top=5)

# %% [markdown]
# A *round* of this run is a step of four tokens. Its genealogy, with a column for each round: lines are texts, their
# width is the weight of what became of them, grey ones left no descendants, and a dotted line says that the population
# was resampled there.

# %%
axes = figures.genealogy(out, tok)

# %%
figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 2.8), layout="constrained")
figures.weights(out, tok, axes=left)
figures.ess(out, threshold=0.5, axes=middle)
axes = figures.log_z(out, axes=right)

# %% [markdown]
# The same as a page to point at: a particle shows where it comes from, what became of it, and its weight after every
# round. `page.save("run.html")` writes it to one file that needs no network.

# %%
page = view.html(out, tok, title="A sentence about the sea, with few e")
page

# %% [markdown]
# **Against best-of-n**, with as many particles: it draws whole texts from the model and asks the judge once. What it
# returns is the best of what the model happened to write; the particle filter wrote what the judge asked for.

# %%
best = best_of_n.run(jax.random.key(1), p * ppl.reward(ppl.python(few_e, tok)), num_samples=24)
filtered = [
    out,
    *(
        smc.run(key, target, num_particles=24, steps=steps, history=True)
        for key in jax.random.split(jax.random.key(2))
    ),
]


def count_e(x) -> np.ndarray:
    return np.array(
        [tok.decode(x.tokens[i, : x.length[i]]).count("e") for i in range(x.tokens.shape[0])]
    )


def text(x, i) -> str:
    return tok.decode(x.tokens[i, : x.length[i]])


print(f"the model alone: {count_e(best.sequences).mean():.1f} letters e in a text")
print(
    f"the best of 24:  {count_e(best.sequences)[best.best]}   {text(best.sequences, best.best)!r}"
)
for run in filtered:
    mean = np.average(count_e(run.sequences), weights=diagnostics.normalise(run.log_weights))
    print(f"weighted texts:  {mean:.1f} {text(run.sequences, jnp.argmax(run.log_weights))!r}")

# %% [markdown]
# ## 2. What it is exact about
#
# On a model small enough to list all its strings we see what a method samples from. The three letters of the first
# notebook; the reward $r$, a probability, likes `c` and not `a`, and is asked after every letter. In log-odds, as
# particle filtering has it (arXiv 2502.01618), the target is $p(x)\, r(x) / (1 - r(x))$.


# %%
def reward(tokens, length):
    there = jnp.arange(tokens.shape[1]) < length[:, None]
    return jax.nn.sigmoid(
        1.2 * ((tokens == 2) & there).sum(1) - 0.8 * ((tokens == 0) & there).sum(1)
    )


every_letter = ppl.Steps(every=1)
chain = tabular.markov(
    [
        [0.60, 0.25, 0.03, 0.12],
        [0.10, 0.20, 0.50, 0.20],
        [0.70, 0.20, 0.05, 0.05],
        [0.00, 0.00, 0.00, 1.00],
    ],
    eos=3,
).given([2], max_tokens=4)
small = particle_filtering.rewarded(chain, reward, every_letter)
exact = ppl.exact.enumerate_strings(small)

N, key = 5_000, jax.random.key(2)
properly = particle_filtering.run(key, chain, reward, every_letter, num_particles=N)
published = particle_filtering.published(key, chain, reward, every_letter, num_particles=N)
runs = {
    "particle filtering": (properly.sequences, properly.log_weights),
    "as published": (published.sequences, published.details["log_weights"]),
}
for name, (strings, log_weights) in runs.items():
    law = exact.law(strings.tokens, log_weights)
    print(f"{name:18} total variation to the target {0.5 * np.abs(law - exact.probs).sum():.3f}")

# %% [markdown]
# The published form resamples from the absolute score again and again, so that early steps are paid for many times
# over; more particles do not mend that. The docstring of `particle_filtering.published` says what it samples from.
#
# **How ancestors are chosen** is free, as long as the ratio is carried in the weights: by weight, from a hotter law
# (fewer lineages die out), or with a look ahead. The evidence stays unbiased; its spread is what differs. With eight
# particles, fifty thousand runs each:

# %%
selections = {
    "by weight": selection.by_weight,
    "annealed, T = 2": selection.annealed(2.0),
    "one step ahead": selection.next_step(every_letter),
}


def evidence(choose, keys):
    """Z-hat of one run per key."""
    one = lambda key: smc.run(key, small, num_particles=8, selection=choose, threshold=2.0).log_z  # noqa: E731
    return np.exp(np.asarray(jax.vmap(one)(keys), np.float64))


for name, choose in selections.items():
    z = evidence(choose, jax.random.split(jax.random.key(3), 50_000))
    error = z.std(ddof=1) / np.sqrt(len(z))
    print(f"{name:16} mean of Z {z.mean():.3f} ± {error:.3f}   spread of one run {z.std():.2f}")
print(f"{'exact':16} {np.exp(exact.log_z):15.3f}")

# %% [markdown]
# ## 3. Conditional SMC
#
# *Conditional* SMC carries one given string along: its particle is pinned (squares), the others resample around it.
# Here it is the least probable string of all.

# %%


class Letters:
    """All that the pictures need of a tokenizer."""

    def decode(self, ids):
        return "".join("abc$"[token] for token in ids)


worst = int(np.argmin(exact.probs))
reference = jax.tree.map(lambda leaf: leaf[worst : worst + 1], exact.sequences)
pinned = conditional.run(jax.random.key(4), small, reference, num_particles=12, history=True)
axes = figures.genealogy(pinned, Letters(), pinned=-1)

# %% [markdown]
# Drawing the next reference from its final weights makes a Markov chain, *particle Gibbs*, that leaves $\gamma / Z$
# invariant at any number of particles. Two hundred chains with three particles each, started from that string:

# %%
gibbs = conditional.kernel(small, num_particles=3, batch_size=200)
state = gibbs.init(jax.tree.map(lambda leaf: jnp.repeat(leaf, 200, axis=0), reference))
seen = []
for sweep, key in enumerate(jax.random.split(jax.random.key(5), 40)):
    state, info = gibbs.step(key, state)
    seen.append(state.tokens)
    if sweep in (0, 9, 39):
        tokens = jnp.concatenate(seen[sweep // 2 :])
        law = exact.law(tokens, jnp.zeros(len(tokens)))
        distance = 0.5 * np.abs(law - exact.probs).sum()
        print(
            f"sweep {sweep + 1:2}: total variation of the second half to the target {distance:.3f}"
        )

# %% [markdown]
# **Bounds from both sides.** On average, log Z estimated by SMC is too low, and by conditional SMC on an exact draw too
# high; their gap bounds the error of both, without knowing the truth.

# %%
rng = np.random.default_rng(6)
probs = np.asarray(exact.probs, np.float64)
rows = jnp.asarray(rng.choice(len(probs), size=400, p=probs / probs.sum()))
draws = jax.tree.map(lambda leaf: leaf[rows], exact.sequences)
for n in (2, 8):
    both = bounds.run(jax.random.key(7), small, draws, num_particles=n, batch_size=400)
    print(f"N = {n}   {both.lower:.3f} <= log Z <= {both.upper:.3f}   (exact {exact.log_z:.3f})")
