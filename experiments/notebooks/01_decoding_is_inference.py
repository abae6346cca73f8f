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
# # Decoding is inference
#
# Decoding is drawing from a density over strings,
#
# $$\gamma(x) = p(x \mid \text{prompt})^{\alpha}\,\Phi(x), \qquad x \text{ of at most } T \text{ tokens},$$
#
# with $p$ a language model, $\alpha$ a power and $\Phi \ge 0$ whatever else is wanted: a format, a reward, a second
# model. $\gamma$ is not normalised. Its total mass $Z = \sum_x \gamma(x)$ is the *evidence*, and the law we are after
# is $\gamma / Z$, the *posterior*.
#
# A sampler returns **weighted strings**: for every function $f$,
# $\mathbb{E}\big[\hat Z \cdot \tfrac1N \sum_i w_i f(x_i)\big] = \sum_x \gamma(x) f(x)$. The first half of this notebook
# checks that on a model small enough to list all its strings; the second half uses a real one.

# %%
import dataclasses

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer.util import log_density

import models
import ppl
from experiments import compilation
from experiments.decode import decoding
from experiments.showing import figures, saving
from models import tabular
from ppl.table import merge
from samplers import diagnostics, smc
from samplers.draws import ancestral
from samplers.smc import importance

compilation.use_cache()  # compiled programs are kept, so a second run is quicker

# %% [markdown]
# ## 1. A model we can enumerate
#
# Three letters and an end token; the next letter depends on the last one. The model likes `a`, and rarely goes from
# `a` to `c`. The wish $\Phi$: the string ends in `c`. The prompt is `c`, and strings have at most four letters.


# %%
@dataclasses.dataclass(frozen=True)
class Letters:
    """What a constraint needs of a tokenizer: the bytes of each token, and the end."""

    token_bytes: tuple = (b"a", b"b", b"c", None)
    eos: int = 3
    vocab_size: int = 4

    def decode(self, ids):
        return "".join("abc"[token] for token in ids)


letters = Letters()
chain = tabular.markov(
    [
        [0.60, 0.25, 0.03, 0.12],
        [0.10, 0.20, 0.50, 0.20],
        [0.70, 0.20, 0.05, 0.05],
        [0.00, 0.00, 0.00, 1.00],
    ],
    eos=letters.eos,
)
p = chain.given([2], max_tokens=4)
target = p * ppl.regex("[abc]*c", letters)

exact = ppl.exact.enumerate_strings(target)
print(
    f"{len(exact.probs)} strings, {int((exact.probs > 0).sum())} of them end in c;  Z = {np.exp(exact.log_z):.4f}"
)

# %% [markdown]
# **Masking is not conditioning.** The usual way to constrain a model is to forbid, token by token, what cannot lead to
# a match, and to renormalise. That draws from the wrong law: it walks into `a` because the model likes it, and only
# then finds that the way out is improbable. The importance weights, $w = \gamma(x) / q(x)$, say how wrong each string
# is; SMC also uses them on the way, and copies what is promising.

# %%
N = 20_000
masked = importance.run(jax.random.key(1), target, num_particles=N)
sampled = smc.run(jax.random.key(2), target, num_particles=N)
laws = {
    "exact posterior": exact.probs,
    "SMC": exact.law(sampled.sequences.tokens, sampled.log_weights),
    "masked, with weights": exact.law(masked.sequences.tokens, masked.log_weights),
    "masked, without": exact.law(masked.sequences.tokens, jnp.zeros(N)),
}

shown = np.argsort(-np.maximum(exact.probs, laws["masked, without"]))[:12]
tokens, length = np.asarray(exact.sequences.tokens), np.asarray(exact.sequences.length)
names = [letters.decode(tokens[i, : length[i]]) for i in shown]
figure, axes = plt.subplots(figsize=(10, 3.2), layout="constrained")
for k, (name, law) in enumerate(laws.items()):
    axes.bar(np.arange(len(shown)) + 0.2 * (k - 1.5), law[shown], width=0.2, label=name)
axes.set_xticks(np.arange(len(shown)), names)
axes.set_ylabel("probability")
axes.legend(frameon=False)
for name, law in laws.items():
    print(f"{name:22} total variation to the posterior {0.5 * np.abs(law - exact.probs).sum():.3f}")

# %% [markdown]
# **The evidence is unbiased**, whatever the number of particles: five thousand runs with *four* particles each scatter
# widely, and their mean is $Z$.

# %%
runs = jax.vmap(lambda key: smc.run(key, target, num_particles=4).log_z)(
    jax.random.split(jax.random.key(3), 5000)
)
z = np.exp(np.asarray(runs, np.float64))
error = z.std(ddof=1) / np.sqrt(len(z))
print(f"mean of 5000 estimates {z.mean():.4f} ± {error:.4f},  exact {np.exp(exact.log_z):.4f}")
figure, axes = plt.subplots(figsize=(6, 2.4), layout="constrained")
axes.hist(z, bins=60, color="0.7")
axes.axvline(np.exp(exact.log_z), color="C1", label="Z")
axes.axvline(z.mean(), color="C0", linestyle=":", label="mean of the estimates")
axes.set_xlabel("estimate of Z from four particles")
axes.legend(frameon=False)
plt.show()
# %% [markdown]
# ## 2. A language model
#
# The same three lines, with SmolLM2-135M-Instruct. The model knows the date, but left alone it answers in sentences.

# %%
lm, tok = models.load("smollm2-135m")
question = "When was the Declaration of Independence signed? Answer with the date only."
p = lm.given(tok.chat(question), max_tokens=16)

alone = ancestral.run(jax.random.key(0), p, num_samples=32).sequences
for i in range(4):
    print(repr(tok.decode(alone.tokens[i, : alone.length[i]])))

# %%
months = "January|February|March|April|May|June|July|August|September|October|November|December"
date = ppl.regex(rf"({months}) ([1-9]|[12][0-9]|3[01]), [12][0-9]{{3}}", tok)
matches = np.isfinite(np.asarray((p * date).log_density(alone.tokens, alone.length)))
print(f"{matches.sum()} of 32 answers are a date and nothing else\n")


def by_text(out):
    """text -> (weight, share of the draws), heaviest first; one text may have several tokenisations."""
    rows = {}
    for text, weight, copies, _ in merge(out, tok):
        total = rows.get(text, (0.0, 0.0))
        rows[text] = total[0] + weight, total[1] + copies / len(out.log_weights)
    return dict(sorted(rows.items(), key=lambda row: -row[1][0]))


masked = importance.run(jax.random.key(0), p * date, num_particles=64)
print(f"{'drawn':>6} {'weight':>7}")
for text, (weight, drawn) in sorted(by_text(masked).items(), key=lambda row: -max(row[1]))[:8]:
    print(f"{drawn:6.3f} {weight:7.3f}  {text}")
print(f"ESS {diagnostics.ess(masked.log_weights):.1f} of 64")

# %% [markdown]
# The left column is what masking alone would have returned. Why is it so far off? Look at the first token: letters
# such as `D` are not how this model starts a month, but how it starts another answer. The mask lets them through, since
# some month begins with them, and forces the rest. Such strings have next to no weight. SMC drops them as soon as the
# weights show it, and spends its particles elsewhere.

# %%
first, weights = (
    np.asarray(masked.sequences.tokens[:, 0]),
    np.asarray(diagnostics.normalise(masked.log_weights)),
)
for token in sorted(set(first.tolist()), key=lambda token: -(first == token).mean())[:5]:
    chosen = first == token
    print(
        f"first token {tok.decode([token])!r:12} drawn {chosen.mean():.2f}, weight {weights[chosen].sum():.3f}"
    )

# %%
out = smc.run(jax.random.key(0), p * date, num_particles=64)
ppl.table(out, tok)

# %% [markdown]
# **What log Z means here.** With $\alpha = 1$ and a yes-or-no $\Phi$, $Z$ is the probability that the model's own
# answer matches. Its inverse is how many answers one would have to draw, on average, to keep one.

# %%
print(f"log Z = {out.log_z:.2f} ± {out.log_z_std_error:.2f}")
print(
    f"Z = {np.exp(out.log_z):.4f}: rejection sampling would keep one answer in {np.exp(-out.log_z):.0f}"
)

# %% [markdown]
# ## 3. The algebra
#
# **Powers** sharpen whole strings, not single tokens: $p^\alpha$ asks which *answer* is probable, where a low
# temperature asks for a probable next token.

# %%
for alpha in (1.0, 2.0, 3.0):
    out = smc.run(jax.random.key(4), p**alpha * date, num_particles=64)
    top = ", ".join(f"{text} {weight:.2f}" for text, (weight, _) in list(by_text(out).items())[:3])
    print(f"alpha = {alpha:g}   log Z {out.log_z:7.2f} ± {out.log_z_std_error:.2f}   {top}")

# %% [markdown]
# Estimates can be poor, and say so: a standard error of log Z near its greatest value, 1, means that nearly all weight
# descends from one first token. `log_density` is the referee: it computes $\log\gamma$ of any string from scratch, and
# shows which answer is the more probable one at any power, whatever a run with few particles returned.

# %%


def pad(rows, max_tokens):
    """Token ids as (tokens [N, T], length [N])."""
    tokens = [row + [tok.eos] * (max_tokens - len(row)) for row in rows]
    return jnp.array(tokens, jnp.int32), jnp.array([len(row) for row in rows], jnp.int32)


candidates = ["July 4, 1776", "December 2, 1776"]
for text, value in zip(
    candidates, (p * date).log_density(*pad([tok.encode(c) for c in candidates], 16)), strict=True
):
    print(f"log density {value:.2f}  {text}")

# %% [markdown]
# **Any Python function** of the text can be a factor. Here: dates in summer count ten times as much.


# %%
def summer(text: str) -> float:
    return float(np.log(10.0)) if text.startswith(("June", "July", "August")) else 0.0


def share(out) -> float:
    return sum(weight for text, (weight, _) in by_text(out).items() if summer(text) > 0)


before = smc.run(jax.random.key(5), p * date, num_particles=64)
after = smc.run(jax.random.key(5), p * date * ppl.reward(ppl.python(summer, tok)), num_particles=64)
odds = share(before) / (1 - share(before))
print(f"share of summer: {share(before):.2f} without, {share(after):.2f} with the reward")
print(f"to be expected from the first: {10 * odds / (1 + 10 * odds):.2f}")

# %% [markdown]
# **A product of two models**, or of one model under two prompts, asks for what both find probable. The list is short,
# so `log_density` gives the exact answer beside each estimate (for the usual tokenisation of each city).

# %%
cities = ("Paris", "London", "Rome", "Berlin", "Madrid", "Tokyo", "Moscow", "Cairo", "Athens")
prompts = (
    "Name a capital of Europe. Answer with one word.",
    "Name a very old city. Answer with one word.",
)
city = ppl.regex("|".join(cities), tok)
europe, old = (lm.given(tok.chat(text), max_tokens=6) for text in prompts)
tokens, length = pad([tok.encode(text) for text in cities], 6)
for name, target in {
    "Europe": europe * city,
    "old": old * city,
    "Europe and old": europe * old * city,
}.items():
    exact = jax.nn.softmax(target.log_density(tokens, length))
    estimate = by_text(smc.run(jax.random.key(6), target, num_particles=64))
    top = np.argsort(-exact)[:4]
    print(
        f"{name:15}",
        ", ".join(
            f"{cities[i]} {estimate.get(cities[i], (0.0,))[0]:.2f} ({exact[i]:.2f})" for i in top
        ),
    )

# %% [markdown]
# **Text inside a NumPyro model.** `ppl.Text` makes a target a distribution, so text can be one site of a larger model.
# Here a latent topic chooses the prompt, a text is observed, and Bayes' rule gives the topic.

# %%
topics = ("the sea", "mountains", "cooking")
prior = jnp.array([0.5, 0.3, 0.2])
givens = [
    lm.given(tok.chat(f"Write one short sentence about {topic}."), max_tokens=16)
    for topic in topics
]


def story(givens, text=None):
    topic = numpyro.sample("topic", dist.Categorical(prior))
    prefix = jax.tree.map(
        lambda *leaves: jnp.stack(leaves)[topic], *(given.prefix for given in givens)
    )
    numpyro.sample("text", ppl.Text(dataclasses.replace(givens[0], prefix=prefix)), obs=text)


# The targets are an argument: closed over, the model's weights would be constants of the compiled program.
log_joint = jax.jit(
    lambda givens, topic, text: log_density(story, (givens, text), {}, {"topic": topic})[0]
)
for text in (
    "The waves rolled in at dawn.",
    "The air grew thin and cold.",
    "The soup smelled of garlic.",
):
    posterior = jax.nn.softmax(
        jnp.array([log_joint(givens, k, pad([tok.encode(text)], 16)[0][0]) for k in range(3)])
    )
    print(
        f"{text:30}",
        ", ".join(f"{topic} {q:.2f}" for topic, q in zip(topics, posterior, strict=True)),
    )

# %% [markdown]
# ## 4. Watching a run
#
# `smc.iterate` yields the population after every token, with the same result as `smc.run`.

# %%
for out in smc.iterate(jax.random.key(7), p * date, num_particles=32):
    t = int(out.rounds)
    so_far = dataclasses.replace(
        out, samples=ppl.Sequences(out.sequences.tokens[:, :t], out.sequences.length)
    )
    size, (text, weight, *_) = out.trace.ess[t - 1], merge(so_far, tok)[0]
    note = "resampled before" if out.trace.resampled[t - 1] else ""
    print(f"token {t:2}  ESS {size:4.1f}  log Z {out.log_z:7.3f}  {weight:.2f} {text!r:20} {note}")

# %% [markdown]
# The command line does the same and saves it, with a picture of the genealogy: every line is a string, and grey ones
# left no descendants.
#
#     python -m experiments.decode --prompt "..." --regex "..." --num-particles 32

# %%
config = saving.Config(prompt=question, num_particles=32, max_tokens=16, seed=7)
figures.draw(decoding.decode(config, p * date, tok))
