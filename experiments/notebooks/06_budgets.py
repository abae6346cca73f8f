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
# # Many answers, one budget
#
# Ask a model many times, and choose: by votes, by a verifier, until it is clear enough. Which choice, and how many draws?
# The strings are drawn **once**, into a pool, and every choice, every rule of stopping and every budget is read off that
# pool, without bias. Where probabilities are known the answer is a formula, and there is nothing to draw at all.

# %%
import jax
import matplotlib.pyplot as plt
import numpy as np

import models
from experiments import compilation
from samplers.search import allocation, answers, coverage, laws, pools, stopping, votes
from samplers.strings import prompts

compilation.use_cache()  # compiled programs are kept, so a second run is quicker
key = jax.random.key(0)

# %% [markdown]
# ## 1. One pool for each prompt
#
# Six sums, 64 answers each, from SmolLM2-135M. All prompts go through the model in one batch.

# %%
lm, tok = models.load("smollm2-135m")
SUMS = [(2, 3), (7, 5), (12, 9), (25, 17), (38, 46), (123, 89)]
NUM = 64
targets = [
    lm.given(tok.chat(f"What is {a} + {b}? Answer with the number only."), max_tokens=12)
    for a, b in SUMS
]
several = pools.draw(key, targets, num=NUM, answer=answers.last_number(tok))
truth = np.array([a + b for a, b in SUMS])

# %%
texts = [tok.decode(pool.samples) for pool in prompts.apart(several)]
said = [[answers.number(text) for text in row] for row in texts]
truth = [a + b for a, b in SUMS]
correct = np.array(
    [[value == right for value in row] for row, right in zip(said, truth, strict=True)]
)
for (a, b), row, right in zip(SUMS, said, correct, strict=True):
    counts = {value: row.count(value) for value in set(row) if value is not None}
    top = sorted(counts, key=counts.__getitem__, reverse=True)[:4]
    print(f"{a} + {b}: {right.mean():.2f} right;", ", ".join(f"{v} x{counts[v]}" for v in top))

# %% [markdown]
# ## 2. Every budget from the same draws
#
# *pass@k*, whether one of k draws is right, is an average over all subsets of k draws, and so is what a majority of k would
# say, up to the order in which the draws are read: no budget needs draws of its own. The gap between the two curves is
# what a perfect verifier would be worth.

# %%
budgets = np.array([1, 2, 4, 8, 16, 32, 64])
coverage_curve = votes.pass_at_k(correct.sum(axis=1), budgets, num=NUM)
orders = jax.random.split(jax.random.key(1), len(SUMS))
read = jax.jit(
    jax.vmap(
        lambda key, pool: (
            stopping.replay(
                key, pool, stopping.fixed(NUM), draws=budgets.tolist(), num_orders=50
            ).answer
        )
    )
)
elected = np.asarray(read(orders, several))  # ids of answers: [P, orders, k]
right_ids = [
    set(row[right]) for row, right in zip(np.asarray(several.answer), correct, strict=True)
]
voted = [np.isin(row, list(ids)).mean(axis=0) for row, ids in zip(elected, right_ids, strict=True)]

figure, axes = plt.subplots(1, len(SUMS), figsize=(13, 2.6), sharey=True, layout="constrained")
for i, (axis, (a, b)) in enumerate(zip(axes, SUMS, strict=True)):
    axis.semilogx(budgets, coverage_curve[i], "o-", base=2, label="pass@k")
    axis.semilogx(budgets, voted[i], "s-", base=2, label="majority of k")
    axis.set(title=f"{a} + {b}", xlabel="draws", ylim=(-0.05, 1.05))
axes[0].set_ylabel("right")
axes[0].legend(frameon=False)
plt.show()

# %% [markdown]
# ## 3. When to stop
#
# A rule looks at the answers as they come. The usual ones (a posterior above 0.95, a unanimous window) look again and again,
# and are wrong more often than they say; the e-process is wrong with probability at most 0.05, however often it looks. None
# of this needs to be simulated: a dynamic programme over the counts knows it.

# %%
RULES = {
    "Beta, .95": stopping.beta(0.95),
    "window of 4": stopping.window(4),
    "e-value, .05": stopping.evalue(0.05, 2),
}
shares = np.linspace(0.5, 0.9, 9)
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
for name, rule in RULES.items():
    found = [stopping.lattice(rule, [share, 1 - share], cap=40) for share in shares]
    left.plot(shares, [law.wrong for law in found], "o-", label=name)
    right.plot(shares, [law.mean_draws for law in found], "o-", label=name)
left.axhline(0.05, color="grey", linewidth=0.8, linestyle="--")
left.set(xlabel="share of the likelier answer", ylabel="stops at the other one", ylim=(0, None))
right.set(xlabel="share of the likelier answer", ylabel="draws, of at most 40", ylim=(0, 41))
left.legend(frameon=False)
plt.show()

# %% [markdown]
# ## 4. A verifier that errs
#
# Best of n trusts its verifier more, the more draws it has. Here the right answer has probability 0.2 and score 0.8, a popular
# wrong one 0.5 and 0.5, and rare wrong ones have whatever score they happen to have. More draws find a rare one that pleases
# the verifier; the majority never finds the right answer; the *majority of the bests* of k, which is read off the same
# pool, does.

# %%
RARE = 100
probs = np.concatenate([[0.2, 0.5], np.full(RARE, 0.3 / RARE)])
scores = np.concatenate([[0.8, 0.5], np.random.default_rng(0).random(RARE)])
nums = 2 ** np.arange(9)
best = [laws.best_of_n(np.log(probs), scores, int(n)) for n in nums]  # of every answer
figure, axis = plt.subplots(figsize=(5.5, 3), layout="constrained")
axis.semilogx(nums, [law[0] for law in best], "o-", base=2, label="best of n: right")
axis.semilogx(nums, [law[1] for law in best], "^-", base=2, label="best of n: the popular error")
axis.semilogx(
    nums, [law[2:].max() for law in best], "v-", base=2, label="best of n: one rare error"
)
axis.set(xlabel="draws", ylabel="probability", ylim=(0, 1))
axis.legend(frameon=False)
plt.show()

# %% [markdown]
# Up to the number of draws where a rare error overtakes, the right answer is the likeliest choice of best of k: a vote over
# many such choices would be right. That is `votes.majority_of_bests(key, pool, k)`.
#
# ## 5. Where draws should go
#
# A hundred prompts, whose success rates range from hopeless to easy, and 16 draws each on average. Greedy allocation draws
# where the next draw adds most, which is optimal; instance-adaptive scaling wants each prompt solved with probability
# 0.99, and spends almost all on those that will not be.

# %%
rng = np.random.default_rng(1)
rates = np.sort(np.where(rng.random(100) < 0.1, 1e-4, rng.beta(0.4, 1.2, 100)))
known = coverage.Known(p=rates)
total = 16 * len(rates)
plans = {
    "uniform": np.full(len(rates), 16),
    "greedy": allocation.greedy(known, total),
    "IAS, scaled": allocation.ias(rates) * total // allocation.ias(rates).sum(),
}
figure, axis = plt.subplots(figsize=(6.5, 3), layout="constrained")
for name, plan in plans.items():
    solved = known.coverage(plan).sum()
    axis.semilogy(rates, np.maximum(plan, 0.5), ".", label=f"{name}: {solved:.1f} solved")
axis.set(xlabel="success rate of one draw", ylabel="draws")
axis.legend(frameon=False)
plt.show()
