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
# # Reading a text backwards
#
# A language model that draws a text is a simulator. What went in (which topic, which temperature) is latent, the text is
# what we see, and the question is the reverse one: **given a text, what was it drawn with?** A posterior network answers
# it for every text at once. It is trained on draws of the model alone, never on its probabilities,
#
# $$-\mathrm{E} \log q(k, \tau \mid \text{text}) \quad\text{is least at}\quad q = p(k, \tau \mid \text{text}),$$
#
# with a categorical head for the topic $k$ and, given the topic, a density of the temperature $\tau$.
#
# First on a model that is small enough to know the answer, then on SmolLM2-135M.

# %%
import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax

import models
import ppl
from amortized import fit
from amortized.calibration import joint, report
from amortized.posteriors import correction, flows, npe, summaries
from experiments import compilation
from models import tabular
from samplers import diagnostics

compilation.use_cache()  # compiled programs are kept, so a second run is quicker
key = jax.random.key(0)
COLOURS = ("C0", "C1", "C2", "C4")

# %% [markdown]
# ## 1. Three topics that can be listed
#
# Markov chains over three letters, `.` ends a text of at most four. The first topic alternates between `a` and `b`, the
# second repeats itself, the third likes `c`. The temperature flattens the law of every letter, so a hot topic is hard to
# tell from another hot one.

# %%
LETTERS, STOP, T = "abc.", 3, 4
NAMES, SHARES = ("alternates", "repeats", "likes c"), jnp.array([0.5, 0.3, 0.2])
TOPICS = jnp.array(
    [
        [[0.10, 0.60, 0.10, 0.20], [0.60, 0.10, 0.10, 0.20], [0.30, 0.30, 0.20, 0.20]],
        [[0.65, 0.10, 0.05, 0.20], [0.10, 0.65, 0.05, 0.20], [0.35, 0.35, 0.10, 0.20]],
        [[0.10, 0.10, 0.60, 0.20], [0.10, 0.10, 0.60, 0.20], [0.05, 0.05, 0.70, 0.20]],
    ]
)
TOPICS = jnp.concatenate([TOPICS, jnp.full((3, 1, 4), 0.25)], axis=1)  # nothing follows the stop
PRIOR = dist.LogNormal(0.0, 0.7)


def law(topic, temperature):
    transition = jax.nn.softmax(jnp.log(TOPICS[topic]) / temperature)
    return tabular.markov(transition, eos=STOP).given(jnp.array([0]), max_tokens=T)


def letters():
    topic = numpyro.sample("topic", dist.Categorical(SHARES))
    temperature = numpyro.sample("temperature", PRIOR)
    numpyro.sample("text", ppl.Text(law(topic, temperature)))


training = npe.training(
    key,
    letters,
    latents=["temperature"],
    discrete=["topic"],
    observed=["text"],
    flow=flows.mixture(num_components=4),
    summary=summaries.one_hot(len(LETTERS)),
)
adam = optax.adam(optax.cosine_decay_schedule(3e-3, 2000))
out = fit.run(key, training, optimizer=adam, num_steps=2000, progress=False)
posterior = npe.posterior(out)
print(
    {name: values[:3] for name, values in posterior.sample(key, jnp.array([2, 2, 2, 3]), 3).items()}
)

# %% [markdown]
# The exact posterior: all 121 texts, three topics, and the temperature on 400 quantiles of its prior.

# %%
strings = ppl.exact.strings(len(LETTERS), T, STOP)
grid = PRIOR.icdf((jnp.arange(400) + 0.5) / 400)
prior = PRIOR.log_prob(grid)


@jax.jit
def enumerated():
    """log p(topic, temperature | text) [K, G, X], and log p(text) [X]."""

    def likelihood(topic, temperature):
        return law(topic, temperature).log_density(strings.tokens, strings.length)

    each = jax.vmap(jax.vmap(likelihood, (None, 0)), (0, None))(jnp.arange(3), grid)
    mass = jnp.log(SHARES)[:, None, None] + each - jnp.log(len(grid))
    log_p = jax.nn.logsumexp(mass, (0, 1))
    return mass - log_p + jnp.log(len(grid)) + prior[:, None], log_p


def learned(posterior, tokens, num_topics, grid):
    """log q(topic, temperature | text) [K, G]."""
    sites = {"temperature": jnp.tile(grid, num_topics)}
    sites["topic"] = jnp.repeat(jnp.arange(num_topics), len(grid))
    return posterior.log_prob(sites, tokens).reshape(num_topics, -1)


exact, log_p = enumerated()
found = jnp.stack([learned(posterior, tokens, 3, grid) for tokens in strings.tokens], -1)
weights = jnp.exp(exact - prior[:, None]) / len(grid)
kl = (weights * (exact - found)).sum((0, 1))
print(f"mean KL to the exact posterior {jnp.exp(log_p) @ kl:.4f} nats; of the prior ", end="")
of_prior = exact - jnp.log(SHARES)[:, None, None] - prior[:, None]
print(f"{jnp.exp(log_p) @ (weights * of_prior).sum((0, 1)):.3f}, which is what a text tells")


# %%
def drawn(axes, grid, exact, found, names, title):
    """Densities of the temperature, of every topic its share: filled exactly, lines as learned."""
    for k, name in enumerate(names):
        axes.fill_between(grid, jnp.exp(exact[k]), color=COLOURS[k], alpha=0.25, linewidth=0)
        axes.plot(grid, jnp.exp(found[k]), color=COLOURS[k], linewidth=1.4, label=name)
    axes.set_title(title, fontsize=9, loc="left")
    axes.set(xlabel="temperature", yticks=[], ylim=(0, None))
    axes.spines[["top", "right", "left"]].set_visible(False)


texts = ("bab.", "bbbb", "cccc", "acb.")
figure, row = plt.subplots(1, 4, figsize=(12, 2.4), layout="constrained")
for axes, text in zip(row, texts, strict=True):
    at = next(
        i for i, tokens in enumerate(strings.tokens) if "".join(LETTERS[t] for t in tokens) == text
    )
    drawn(
        axes,
        grid,
        exact[..., at],
        found[..., at],
        NAMES,
        f"“{text}”   p = {jnp.exp(log_p[at]):.4f}",
    )
    axes.set_xlim(0, 4)
row[0].legend(frameon=False, fontsize=8)
plt.show()

# %% [markdown]
# Filled is exact, lines are learned. Is it calibrated? Draw topic, temperature and text, and ask where the truth stands
# among the network's draws: ranks must be uniform, and regions hold the truth as often as they say. The number of the
# topic has a rank too; ties get places at random.

# %%
them = joint.draw(
    key, posterior.simulator.draw, posterior.draws, num_simulations=1000, num_samples=99
)
checked = report.run(key, them)
print(checked)
figure = checked.plot()
figure

# %% [markdown]
# And where the model has a density, as here, the draws are weighed to exactness: the mean weight estimates the
# probability of the text, and the effective sample size says how good the network was.

# %%
text = jnp.array([1, 1, 1, 1])
at = int(jnp.flatnonzero((strings.tokens == text).all(1))[0])
weighed = correction.run(key, posterior, text, num_particles=2000)
topics = jax.nn.softmax(weighed.log_weights) @ jax.nn.one_hot(weighed.samples["topic"], 3)
print(f"log p(text) {weighed.log_z:.4f}, exactly {log_p[at]:.4f}")
print(f"ESS {diagnostics.ess(weighed.log_weights):.0f} of 2000")
print("topics, weighed", topics.round(3), "exactly", weights[..., at].sum(1).round(3))

# %% [markdown]
# ## 2. A language model
#
# The same with SmolLM2-135M. A topic is the beginning of a text, which we do not get to see; what we see are the twelve
# tokens after it. A temperature divides the logits, and so does one that divides the last normalisation of the model: it
# is a weight like others.

# %%
lm, tok = models.load("smollm2-135m")
BEGINNINGS = ("Once upon a time", "import numpy as", "The football team", "Mix the flour and")
T, SIMULATIONS = 12, 500
each = lm.given_each([tok.encode(text) for text in BEGINNINGS], max_tokens=T)
prefixes = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(p.prefix for p in each))
LOW, HIGH = 0.3, 1.5


def heated(p, temperature):
    """The law of the next token at a temperature."""
    scale = p.lm.params["final_norm"]["scale"] / temperature
    params = p.lm.params | {"final_norm": {"scale": scale}}
    prefix = dataclasses.replace(p.prefix, logits=p.prefix.logits / temperature)
    return dataclasses.replace(p, lm=dataclasses.replace(p.lm, params=params), prefix=prefix)


def written(p, prefixes):
    topic = numpyro.sample("topic", dist.Categorical(logits=jnp.zeros(len(BEGINNINGS))))
    temperature = numpyro.sample("temperature", dist.Uniform(LOW, HIGH))
    prefix = jax.tree.map(lambda leaf: leaf[topic], prefixes)
    numpyro.sample("text", ppl.Text(heated(dataclasses.replace(p, prefix=prefix), temperature)))


# %% [markdown]
# 500 simulations, drawn once. The summary of a text is what the model itself makes of it, frozen: its hidden states, the
# mean and the last, and its surprise at the tokens. They are read once and kept; a small network on top of them is trained. A tenth is held out,
# and training ends when that stops improving.

# %%
training = npe.training(
    key,
    written,
    latents=["temperature"],
    discrete=["topic"],
    observed=["text"],
    args=[each[0], prefixes],
    flow=flows.mixture(num_components=2, width=20, depth=1),
    summary=summaries.language_features("text", lm, tok.encode("\n"), size=10, width=32, depth=1),
    num_simulations=SIMULATIONS,
    batch_size=60,
)
seen = training.draw.held_out
named = eqx.filter_jit(lambda simulator, theta: jax.vmap(simulator.constrain)(theta))
sites = named(training.params.simulator, seen.theta)
for i in range(8):
    print(
        f"{sites['temperature'][i]:.2f}  {BEGINNINGS[int(sites['topic'][i])]} |"
        f"{tok.decode(np.asarray(seen.x['text'][i]))!r}"
    )

# %%
out = fit.run(
    key,
    training,
    optimizer=optax.adamw(5e-4, weight_decay=0.1),
    num_steps=40 * training.draw.steps,
    chunk=training.draw.steps,  # an epoch
    patience=6,
    criterion=npe.held_out,
    progress=False,
)
posterior = npe.posterior(out)
epochs = {
    name: out.history[name].reshape(-1, training.draw.steps).mean(1)
    for name in ("loss", "held_out")
}
figure, axes = plt.subplots(figsize=(4.5, 2.4), layout="constrained")
for name, values in epochs.items():
    axes.plot(values, label=name.replace("_", " "))
axes.set(xlabel="epoch", ylabel="loss")
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# The network has not seen a single probability, but we can: four passes through the model give the logits after every
# beginning, and these the likelihood at all temperatures. So the exact posterior is known here as well.

# %%
grid = jnp.linspace(LOW, HIGH, 26)[1:-1]


@jax.jit
def exact_posterior(lm, prefixes, text):
    """log p(topic, temperature | text) [K, G]."""
    inside = jnp.arange(T) <= jnp.argmax(jnp.append(text, lm.eos) == lm.eos)

    def of_prefix(prefix):
        after = lm.extend(prefix, text[None])[0]
        logits = jnp.concatenate([prefix.logits[None], after[:-1]])

        def at(temperature):
            log_probs = jax.nn.log_softmax(logits / temperature)
            return jnp.where(inside, log_probs[jnp.arange(T), text], 0).sum()

        return jax.lax.map(at, grid)

    likelihood = jax.lax.map(of_prefix, prefixes)
    return likelihood - jax.nn.logsumexp(likelihood) - jnp.log(grid[1] - grid[0])


OWN = (
    ", there was a little girl who lived in a small house near the dark woods with her mother.",
    " np\nimport pandas as pd\nimport matplotlib.pyplot as plt\n\ndef main():",
    " won the game by two goals in front of a large crowd of fans at home.",
    " sugar purple eleven is window because Rome jumped the never under blue why",
)
figure, row = plt.subplots(1, 4, figsize=(14, 2.6), layout="constrained")
for axes, text in zip(row, OWN, strict=True):
    tokens = jnp.array(tok.encode(text)[:T])
    exact = exact_posterior(lm, prefixes, tokens)
    drawn(
        axes,
        grid,
        exact,
        learned(posterior, tokens, 4, grid),
        BEGINNINGS,
        text.strip()[:42].replace("\n", " "),
    )
row[-1].legend(frameon=False, fontsize=8, loc="upper left")
plt.show()

# %% [markdown]
# On texts that were held out: log density of the truth under the prior, the network, and the exact posterior. What lies
# between the last two is what more simulations, or a summary that reads the text better, could still give.

# %%
few = slice(0, 24)
truth = jax.tree.map(lambda leaf: leaf[few], sites)
exact = jnp.stack([exact_posterior(lm, prefixes, text) for text in seen.x["text"][few]])
nearest = jnp.abs(grid - truth["temperature"][:, None]).argmin(1)
drawn_as = [
    posterior.log_prob(jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], truth), seen.x["text"][i])
    for i in range(24)
]
scores = {
    "prior": jnp.full(24, -jnp.log(4 * (HIGH - LOW))),
    "network": jnp.concatenate(drawn_as),
    "exact": exact[jnp.arange(24), truth["topic"], nearest],
}
for name, score in scores.items():
    print(f"{name:8} {score.mean():6.2f} ± {score.std() / 24**0.5:.2f}")

# %% [markdown]
# And the ranks of what was held out, with the band that chance allows. The exact law of ranks holds at any number of
# simulations; few of them see only what is far off.

# %%
keys = jax.random.split(key, len(seen.theta))
draws = [posterior.sample(key, text, 39) for key, text in zip(keys, seen.x["text"], strict=True)]
draws = jax.tree.map(lambda *leaves: jnp.stack(leaves), *draws)
contexts = jax.vmap(posterior.network.summary)(seen.x)
checked = report.run(key, joint.Joint(sites, contexts, draws))
print(checked)
figure = checked.plot()
figure

# %% [markdown]
# Last, the correction. Whatever the network has learned from 500 texts, weights put it right: every draw is scored by the
# language model after its own beginning and at its own temperature.

# %%
tokens = jnp.array(tok.encode(OWN[2])[:T])
weighed = correction.run(key, posterior, tokens, num_particles=64)
shares = jax.nn.softmax(weighed.log_weights)
exact = jnp.exp(exact_posterior(lm, prefixes, tokens)) * (grid[1] - grid[0])
mean = shares @ weighed.samples["temperature"]
print(f"ESS {diagnostics.ess(weighed.log_weights):.0f} of 64")
print(f"temperature {mean:.3f}, by the network {weighed.samples['temperature'].mean():.3f}", end="")
print(f", exactly {(exact * grid).sum():.3f}")
for k, name in enumerate(BEGINNINGS):
    own = weighed.samples["topic"] == k
    print(
        f"{name:18} {shares @ own:.3f}, by the network {own.mean():.3f}, exactly {exact[k].sum():.3f}"
    )
