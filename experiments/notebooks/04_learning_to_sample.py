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
# # Learning to sample
#
# The samplers so far start anew for every target. Here a second language model $q$, the *guide*, is trained until it
# draws from $\gamma / Z$ by itself, one token after the other. It need not get there: a guide that is only half right
# is a good proposal, and with its importance weights the answer is exact again.
#
# The task is **infilling**. Text before a gap and text after it are known; between them stands something that the
# model $p$ would write,
#
# $$\gamma(x) = p(x \mid \text{before})\; p(\text{after} \mid \text{before}, x).$$
#
# Drawing from $p$ knows nothing of what comes after. The posterior does.

# %%
import dataclasses

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import models
import ppl
from amortized import fit
from amortized.strings import evidence, gflownet, guide, prefix_rewards
from experiments import compilation
from experiments.twist_learning import __main__ as twist_learning
from experiments.twist_learning.worlds import World
from models import tabular
from ppl.rows import take_rows
from samplers import smc
from samplers.strings.proposals import LanguageModel, locally_optimal, mixture

compilation.use_cache()  # compiled programs are kept, so a second run is quicker

# %% [markdown]
# ## 1. A gap we can enumerate
#
# A hidden Markov model with three moods, each with a favourite letter, which seldom change. Before the gap stands `aa`,
# after it `bbb`; the gap ends with a full stop, or after four letters. The guide is a table with a row of logits for
# every prefix, all of them zero: it knows nothing.

# %%
LETTERS, STOP, T = "abc.", 3, 4
moods = 0.9 * np.eye(3) + 0.1 / 3
base = tabular.hmm([1 / 3] * 3, moods, 0.7 * np.eye(3, 4) + 0.075, eos=STOP)
base_rows = tabular.num_prefixes(4, 1 + T)


def target_of(lm, example):
    p = law_of(lm, example)
    return p * ppl.continuation(p, example["after"])


def law_of(lm, example):
    return ppl.Target(lm, lm.read(example["before"], jnp.int32(2)), T)


task = gflownet.Task(
    base, {"before": jnp.array([[0, 0]]), "after": jnp.array([[1, 1, 1]])}, target_of, law_of
)
target, p = task.target(0), task.law(base, 0)
exact = ppl.exact.enumerate_strings(target)
print(f"{len(exact.probs)} strings, log Z = {exact.log_z:.4f}")

# %% [markdown]
# Each step draws strings from the guide, hotter and colder than it is, and replays some old ones. The loss asks for
# balance between any two prefixes $u$ and $uv$ of a string,
#
# $$\gamma(u)\; q(v \mid u)\; q(\text{stop} \mid uv) = \gamma(uv)\; q(\text{stop} \mid u),$$
#
# where $\gamma(u)$ is the density of the string that stops after $u$. That holds everywhere exactly when $q$ draws from
# $\gamma / Z$ (*modified sub-trajectory balance*, arXiv 2310.04363). The key of a step depends on its number alone, so
# a longer run goes through the same steps as a shorter one.

# %%
nothing = guide.full(tabular.table(jnp.zeros((base_rows, 4)), eos=STOP))
training = gflownet.training(nothing, task, num=16, objective=gflownet.modified_subtb, slots=8)
adam = optax.adam(optax.cosine_decay_schedule(0.1, 1000))


def trained(steps):
    options = {"optimizer": adam, "num_steps": steps, "progress": False}
    out = fit.run(jax.random.key(0), training, **options)
    return dataclasses.replace(nothing, params=out.params["guide"])


looks = (3, 10, 30, 100, 300, 1000)
guides = {0: nothing} | {steps: trained(steps) for steps in looks}
distance = {
    steps: evidence.total_variation(target, task.law(g.lm, 0)) for steps, g in guides.items()
}
print(
    {steps: round(d, 5) for steps, d in distance.items()},
    f"  p itself: {evidence.total_variation(target, p):.3f}",
)

# %%
figure, (left, right) = plt.subplots(
    1, 2, figsize=(12, 3), width_ratios=(1, 2.2), layout="constrained"
)
left.loglog(looks, [distance[steps] for steps in looks], marker="o")
left.axhline(evidence.total_variation(target, p), color="0.6", linestyle=":", label="p itself")
left.set(xlabel="steps", ylabel="total variation to the posterior")
left.legend(frameon=False)
laws = {
    "posterior": exact.probs,
    "p": ppl.exact.enumerate_strings(p).probs,
    "guide, untrained": ppl.exact.enumerate_strings(task.law(nothing.lm, 0)).probs,
    "guide, 100 steps": ppl.exact.enumerate_strings(task.law(guides[100].lm, 0)).probs,
    "guide, 1000 steps": ppl.exact.enumerate_strings(task.law(guides[1000].lm, 0)).probs,
}
shown = np.argsort(-np.maximum(exact.probs, laws["p"]))[:14]
tokens, length = np.asarray(exact.sequences.tokens), np.asarray(exact.sequences.length)
names = [
    "".join(LETTERS[t] for t in tokens[i, : length[i]]) + "." * int(length[i] < T) for i in shown
]
for k, (name, law) in enumerate(laws.items()):
    colour = ("k", "0.7", "C3", "C1", "C0")[k]
    right.bar(
        np.arange(len(shown)) + 0.17 * (k - 2), law[shown], width=0.15, label=name, color=colour
    )
right.set(xticks=range(len(names)), xticklabels=names, ylabel="probability")
right.tick_params(axis="x", rotation=45)
right.legend(frameon=False)
plt.show()

# %% [markdown]
# **The evidence comes for free.** Of the empty string $\gamma$ is known, and $q(\text{stop})$ is how often the guide
# draws it, so their ratio is $Z$:

# %%
empty = jnp.full((1, T), STOP), jnp.zeros(1, jnp.int32)
for steps in (0, 100, 1000):
    q = task.law(guides[steps].lm, 0)
    log_z = float((target.log_density(*empty) - q.log_density(*empty))[0])
    print(f"after {steps:4} steps: log Z at the root {log_z:8.4f}   (exact {exact.log_z:.4f})")

# %% [markdown]
# ## 2. Half trained, and exact all the same
#
# A guide is a language model, so it can be the proposal of importance sampling and of SMC. Its errors then cost
# effective samples, not correctness: the estimate of $Z$ is unbiased for every guide.

# %%
half = task.law(guides[100].lm, 0)
proposals = {"p": p, "guide, untrained": task.law(nothing.lm, 0), "guide, 100 steps": half}
print(f"{'':17} {'ESS':>5}   estimate of Z over Z, from four strings, mean of 2000")
for name, q in proposals.items():
    drawn = evidence.draws(jax.random.key(1), target, q, num_particles=8000)
    z = np.exp(np.asarray(drawn.log_weights) - exact.log_z).reshape(2000, 4).mean(1)
    print(
        f"{name:17} {drawn.ess:5.2f}   {z.mean():.3f} ± {z.std() / 2000**0.5:.3f}   (one estimate: ± {z.std():.2f})"
    )

# %% [markdown]
# SMC takes it in the same way, best in a mixture with the model: of what a guide never draws, no effective sample size
# and no standard error tells. `evidence.coverage` looks for it by the model's own draws.

# %%
found = evidence.coverage(jax.random.key(3), target, half, num_particles=256)
print(
    f"the guide misses {found.missed:.3f} of the posterior, log Z gap {found.log_z_gap:.3f} ± {found.gap_std_error:.3f}"
)
guided = mixture([0.9, 0.1], [LanguageModel(half), locally_optimal])
out = smc.run(jax.random.key(2), target, num_particles=64, proposal=guided)
print(f"SMC: log Z = {out.log_z:.3f} ± {out.log_z_std_error:.3f}   (exact {exact.log_z:.3f})")

# %% [markdown]
# ## 3. Or learn what is to come
#
# Another thing to learn is the *twist* $\psi(u)$: how much a prefix $u$ may expect of what follows. It does not draw;
# it tells SMC early what the reward will only say at the end. Here it is learned by contrast between strings of the
# posterior and of the proposal (CTL, arXiv 2404.17546). Given exact draws of the posterior, SMC bounds $\log Z$ from
# both sides, and the bounds close as the twist learns.

# %%
rows = jax.random.categorical(jax.random.key(4), jnp.asarray(exact.log_gamma), shape=(200,))
world = World(target, nothing, take_rows(exact.sequences, rows), exact.log_z, 5e-2)
setting = twist_learning.Setting(("CTL",), (0, 30, 100, 300), (4,), num_runs=200, num_strings=32)
cells = twist_learning.measure(jax.random.key(5), "gap", world, "CTL", setting)
figure, axes = plt.subplots(figsize=(5, 2.8), layout="constrained")
steps = [cell.steps for cell in cells]
for name in ("upper", "lower"):
    values, errors = ([getattr(cell, name + part) for cell in cells] for part in ("", "_std_error"))
    axes.errorbar(range(len(steps)), values, errors, marker="o", label=f"{name} bound, 4 particles")
axes.axhline(exact.log_z, color="k", linewidth=0.8, label="log Z")
axes.set(xlabel="steps of training", xticks=range(len(steps)), xticklabels=steps)
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# ## 4. A language model
#
# The same with SmolLM2-135M and adapters of low rank (LoRA) in its attention: 0.4 million numbers are trained beside
# 135 million that stay, and the guide starts as the model itself. A sentence is missing; it ends with a full stop,
# which is this model's stop token. Rewards are those of whole strings, and the loss is half the variance of
# $\log q - \log \gamma$ over the strings of a step.

# %%
lm, tok = models.load("smollm2-135m")
BEFORE, AFTER, WORDS = "Anna wanted to bake a cake.", " So she went to buy some.", 8
lm = dataclasses.replace(lm, eos=tok.encode("A cake.")[-1])
prompt = lm.prefill(tok.encode(BEFORE))


def sentence(lm, example):
    return ppl.Target(lm, lm.read(example["before"], example["length"]), WORDS)


def between(lm, example):
    p = sentence(lm, example)
    return p * ppl.continuation(p, example["after"])


example = {
    "before": prompt.tokens,
    "length": prompt.length,
    "after": jnp.array(tok.encode(AFTER), jnp.int32),
}
task = gflownet.Task(lm, jax.tree.map(lambda leaf: leaf[None], example), between, sentence)
start = guide.lora(jax.random.key(0), lm, rank=8, targets=("qkv",))
training = gflownet.training(start, task, num=6, rewards=prefix_rewards.at_the_end, slots=16)
options = {"optimizer": optax.adam(1e-3), "num_steps": 10, "max_grad_norm": 1.0, "progress": False}
out = fit.run(jax.random.key(6), training, **options)
after = dataclasses.replace(start, params=out.params["guide"])

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 2.6), layout="constrained")
left.plot(out.history["loss"], marker=".")
left.set(xlabel="step", ylabel="loss", ylim=(0, None))
right.plot(out.history["log_weight"], marker=".")
right.set(xlabel="step", ylabel="mean of log γ - log q")
plt.show()

# %%
target = task.target(0)
for name, g in {"before": start, "after": after}.items():
    q = task.law(g.lm, 0)
    found = evidence.draws(jax.random.key(7), target, q, num_particles=16)
    print(
        f"{name}: log gamma / q = {found.elbo:.2f} ± {found.elbo_std_error:.2f}, ESS {16 * found.ess:.1f} of 16"
    )
    for i in np.argsort(-np.asarray(found.log_weights))[[0, 4, 8, 12]]:
        ids = np.asarray(found.sequences.tokens[i])[: int(found.sequences.length[i]) + 1]
        print(f"   {float(found.log_weights[i]):7.2f}  {BEFORE}[{tok.decode(ids)}]{AFTER}")

# %% [markdown]
# Ten steps of six strings are next to nothing: the curves are noisy, the sentences are still very much the model's
# own, and the weights no better than before. The paper trains for hundreds of steps on a thousand stories; the program
# is the same, with more examples in `Task`, and a checkpoint `directory`: `python -m experiments.infilling`.
