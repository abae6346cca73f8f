"""Every way in which a text site takes part in NumPyro's inference, against enumeration."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.infer import (
    MCMC,
    NUTS,
    SVI,
    Predictive,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
)
from numpyro.infer.util import compute_log_probs

import ppl
from models import tabular
from ppl import exact
from ppl.lm import Prefix

EOS, V, T = 1, 3, 2
ALL = exact.strings(V, T, EOS)
NUM = ALL.length.shape[0]
PROMPTS = ((2, 0), (0,), (2, 2, 0))
PRIOR = np.array([0.5, 0.2, 0.3])
SCORES = np.array([0.3, -1.0, 0.8, 1.5, -0.4, 0.1, -2.0])
"""What a factor makes of each of the strings."""


@functools.cache
def each() -> list[ppl.Target]:
    """A law of texts for every topic, no tracer though a model that is being traced asks first."""
    with jax.ensure_compile_time_eval():
        lm = tabular.random_table(jax.random.key(5), V, 4, eos=EOS)
        return lm.given_each(PROMPTS, max_tokens=T)


@functools.cache
def laws() -> np.ndarray:
    """p(text | topic) [3, M], each by itself."""
    return np.stack([exact.enumerate_strings(p).probs for p in each()])


@functools.cache
def prefixes() -> Prefix:
    with jax.ensure_compile_time_eval():
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *(p.prefix for p in each()))


def chosen(topic: Any) -> ppl.Text:
    """The texts of topics of any shape."""
    prefix = jax.tree.map(lambda leaf: leaf[topic], prefixes())
    return ppl.Text(dataclasses.replace(each()[0], prefix=prefix))


def index(tokens: Any) -> np.ndarray:
    """Which of the strings each text is."""
    return exact.Enumeration(ALL, np.zeros(NUM), V).index(np.asarray(tokens).reshape(-1, T))


def check_shares(found: np.ndarray, probs: np.ndarray) -> None:
    """Independent draws of categories that have these probabilities: each share within five
    standard errors.
    """
    shares = np.bincount(found, minlength=probs.size) / found.size
    error = np.sqrt(probs.ravel() * (1 - probs.ravel()) / found.size)
    assert (np.abs(shares - probs.ravel()) < 5 * error + 1e-9).all()


# A text in the guide.

LETTERS = np.array([0.2, 0.3, 0.5])
FACTORS = np.array([2.0, 0.0, -1.0])
POSTERIOR = LETTERS * np.exp(FACTORS) / (LETTERS * np.exp(FACTORS)).sum()


def letter(logits: Any) -> ppl.Text:
    """One token, EOS being the last of three."""
    return ppl.Text(tabular.table(jnp.reshape(logits, (1, 3)), eos=2).given([0], max_tokens=1))


def one_letter() -> None:
    x = numpyro.sample("x", letter(np.log(LETTERS)))
    numpyro.factor("fits", jnp.asarray(FACTORS, jnp.float32)[x[0]])


def guessed(start: Any = (0.0, 0.0, 0.0)) -> None:
    numpyro.sample("x", letter(numpyro.param("logits", jnp.asarray(start))))


def gradient(logits: Any) -> tuple[np.ndarray, np.ndarray]:
    """The mean of the gradients that `TraceGraph_ELBO` finds for -ELBO, and its standard error."""
    elbo = TraceGraph_ELBO()

    def one(key: Any) -> Any:
        return jax.grad(lambda logits: elbo.loss(key, {"logits": logits}, one_letter, guessed))(
            jnp.asarray(logits)
        )

    found = np.asarray(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), 20_000)))
    return found.mean(0), found.std(0) / np.sqrt(len(found))


def test_a_guides_text_is_not_reparametrised(monkeypatch: pytest.MonkeyPatch):
    """The gradient of -ELBO = sum q log q / gamma is q (log q / gamma + ELBO); with what NumPyro
    says by itself it is another.
    """
    logits = np.array([0.4, 0.1, -0.5])
    q = np.exp(logits) / np.exp(logits).sum()
    log_ratio = np.log(q) - np.log(LETTERS) - FACTORS
    truth = q * (log_ratio - (q * log_ratio).sum())
    assert not letter(logits).has_rsample
    with pytest.raises(NotImplementedError):
        letter(logits).rsample(jax.random.key(0))
    mean, error = gradient(logits)
    assert error.max() < 0.02 and (np.abs(mean - truth) < 5 * error).all()
    monkeypatch.setattr(ppl.Text, "has_rsample", True)
    mean, error = gradient(logits)
    assert np.abs(mean - truth).max() > 0.3


def test_a_guide_with_a_text_learns_the_posterior():
    svi = SVI(one_letter, guessed, numpyro.optim.Adam(0.05), TraceGraph_ELBO(num_particles=128))
    out = svi.run(jax.random.key(0), 300, progress_bar=False)
    q = np.asarray(jax.nn.softmax(out.params["logits"]), np.float64)
    np.testing.assert_allclose(q, POSTERIOR, atol=0.02)
    elbo = (q * (np.log(LETTERS) + FACTORS - np.log(q))).sum()
    np.testing.assert_allclose(elbo, 0.674, atol=0.005)


# No text in the guide.

COUNTS = np.array([3, 1, 4, 2, 5, 1, 2])


def test_a_models_text_learns_its_parameters():
    """Maximum likelihood of observed texts: the shares of what came after each prefix."""
    texts = jnp.repeat(ALL.tokens, COUNTS, axis=0)

    def model() -> None:
        logits = numpyro.param("logits", jnp.zeros((1 + V, V)))
        with numpyro.plate("texts", len(texts)):
            text = ppl.Text(tabular.table(logits, eos=EOS).given([0], max_tokens=T))
            numpyro.sample("text", text, obs=texts)

    svi = SVI(model, lambda: None, numpyro.optim.Adam(0.1), Trace_ELBO())
    out = svi.run(jax.random.key(0), 400, progress_bar=False)
    fitted = tabular.table(out.params["logits"], eos=EOS).given([0], max_tokens=T)
    shares = COUNTS / COUNTS.sum()
    np.testing.assert_allclose(exact.enumerate_strings(fitted).probs, shares, atol=2e-3)
    np.testing.assert_allclose(out.losses[-1], -(COUNTS * np.log(shares)).sum(), rtol=1e-4)


# Something else beside it, and a text that is seen.

SLOPE = np.random.default_rng(3).normal(size=(1 + V, V)).astype(np.float32)
BASE = np.random.default_rng(4).normal(size=(1 + V, V)).astype(np.float32)
SEEN = (4, 6, 3)


def tuned(z: Any) -> ppl.Target:
    return tabular.table(BASE + z * SLOPE, eos=EOS).given([0], max_tokens=T)


def dial() -> None:
    """A number that the law of texts depends on, and three texts."""
    z = numpyro.sample("z", dist.Normal(0.5, 1.2))
    with numpyro.plate("texts", len(SEEN)):
        numpyro.sample("text", ppl.Text(tuned(z)), obs=ALL.tokens[jnp.asarray(SEEN)])


def dials_posterior() -> tuple[float, float, float]:
    """Mean, standard deviation and log evidence, by integration over a grid."""
    grid = np.linspace(-8, 9, 1701)
    density = jax.jit(jax.vmap(lambda z: tuned(z).log_density(ALL.tokens, ALL.length)))
    log_text = np.asarray(density(jnp.asarray(grid, jnp.float32)), np.float64)[:, SEEN].sum(1)
    log_prior = -0.5 * ((grid - 0.5) / 1.2) ** 2 - np.log(1.2 * np.sqrt(2 * np.pi))
    mass = np.exp(log_prior + log_text) * (grid[1] - grid[0])
    mean = (grid * mass).sum() / mass.sum()
    return mean, np.sqrt(((grid - mean) ** 2 * mass).sum() / mass.sum()), np.log(mass.sum())


@pytest.mark.slow
def test_nuts_moves_what_a_text_depends_on():
    mean, deviation, _ = dials_posterior()
    chain = MCMC(NUTS(dial), num_warmup=500, num_samples=8000, progress_bar=False)
    chain.run(jax.random.key(0))
    z = np.asarray(chain.get_samples()["z"], np.float64)
    assert abs(z.mean() - mean) < 0.06 * deviation and abs(z.std() / deviation - 1) < 0.06


@pytest.mark.slow
def test_a_guide_of_what_a_text_depends_on():
    """Its ELBO is below the evidence by the divergence from the best normal law, which is small."""
    mean, deviation, log_evidence = dials_posterior()

    def guide() -> None:
        loc = numpyro.param("loc", 0.0)
        scale = numpyro.param("scale", 1.0, constraint=dist.constraints.positive)
        numpyro.sample("z", dist.Normal(loc, scale))

    elbo = Trace_ELBO(num_particles=64)
    out = SVI(dial, guide, numpyro.optim.Adam(0.02), elbo).run(
        jax.random.key(0), 1500, progress_bar=False
    )
    bound = -float(np.asarray(out.losses[-300:]).mean())
    assert log_evidence - 0.1 < bound < log_evidence + 0.01
    assert abs(float(out.params["loc"]) - mean) < 0.15 * deviation


# Topics, enumerated and drawn.


def topics(num: int | None = None, seen: Any = None) -> Any:
    """A topic and a text of it; `num` of both."""
    with numpyro.plate("texts", num or 1):
        infer = {"enumerate": "parallel"}
        topic = numpyro.sample("topic", dist.Categorical(jnp.asarray(PRIOR)), infer=infer)
        numpyro.sample("text", chosen(topic), obs=seen)


def test_an_enumerated_site_chooses_the_prompt():
    """As an enumerated site has its values, in an axis of their own: sum_z p(z) p(text | z)."""
    model = functools.partial(topics, NUM, ALL.tokens)
    values = handlers.substitute(model, {"topic": jnp.arange(3)[:, None]})
    logs, _ = compute_log_probs(values, (), {}, {}, sum_log_prob=False)
    assert logs["text"].shape == (3, NUM)
    np.testing.assert_allclose(np.exp(logs["text"]), laws(), rtol=1e-4, atol=1e-7)
    joint = np.exp(np.asarray(logs["topic"] + logs["text"], np.float64))
    np.testing.assert_allclose(joint.sum(0), PRIOR @ laws(), rtol=1e-4)


def test_texts_of_several_shapes_and_prompts(monkeypatch: pytest.MonkeyPatch):
    """Batch and value broadcast; prompts one after another score as they do side by side."""
    text = chosen(jnp.asarray([[2], [0]]))
    assert text.batch_shape == (2, 1)
    value = ALL.tokens.reshape(NUM, 1, 1, T)
    expected = np.log(laws()[[2, 0]].T)[:, :, None]
    np.testing.assert_allclose(text.log_prob(value), expected, rtol=1e-4)
    monkeypatch.setattr(ppl.text, "SCORED_LOGITS", 1)
    swapped = jnp.swapaxes(value, 0, 2)
    np.testing.assert_allclose(text.log_prob(swapped), np.swapaxes(expected, 0, 2), rtol=1e-4)
    for of, shape in ((text, (2, 1)), (text.expand((3, 2, 6)), (3, 2, 6))):
        drawn = jax.eval_shape(functools.partial(of.sample, sample_shape=(4,)), jax.random.key(0))
        assert drawn.shape == (4, *shape, T)


def test_plates_draw_every_texts_own_law():
    """Frequencies of (topic, text) in a plate of texts whose prompts are drawn."""
    model = functools.partial(topics, 12_000)
    trace = handlers.trace(handlers.seed(model, jax.random.key(1))).get_trace()
    topic, tokens = (np.asarray(trace[name]["value"]) for name in ("topic", "text"))
    check_shares(topic * NUM + index(tokens), PRIOR[:, None] * laws())


def test_a_plate_of_one_law():
    """Draws of a plate, and their density."""

    def model(seen: Any = None) -> None:
        with numpyro.plate("groups", 2, dim=-2), numpyro.plate("texts", 3000, dim=-1):
            numpyro.sample("text", ppl.Text(each()[0]), obs=seen)

    trace = handlers.trace(handlers.seed(model, jax.random.key(2))).get_trace()
    tokens = trace["text"]["value"]
    assert tokens.shape == (2, 3000, T)
    check_shares(index(tokens), laws()[0])
    logs, _ = compute_log_probs(model, (tokens,), {}, {})
    expected = np.log(laws()[0])[index(tokens)].sum()
    np.testing.assert_allclose(logs["text"], expected, rtol=1e-4)


def test_predictive_draws_the_joint_and_the_conditional_law():
    """Without anything known, and given draws of the topic."""
    drawn = Predictive(topics, num_samples=8000)(jax.random.key(3))
    found = np.asarray(drawn["topic"]).ravel() * NUM + index(drawn["text"])
    check_shares(found, PRIOR[:, None] * laws())
    posterior = {"topic": jnp.full((6000, 1), 2)}
    given = Predictive(topics, posterior_samples=posterior)(jax.random.key(4))
    assert given["text"].shape == (6000, 1, T)
    check_shares(index(given["text"]), laws()[2])


# Those that NumPyro enumerates itself, where funsor is installed.


@pytest.mark.slow
def test_numpyro_enumerates_the_prompts():
    """`TraceEnum_ELBO` of a model whose topics are summed out is the evidence, for any guide."""
    pytest.importorskip("funsor")
    seen = ALL.tokens[jnp.asarray(SEEN)]
    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    model = handlers.seed(functools.partial(topics, len(SEEN), seen), jax.random.key(0))
    loss = elbo.loss(jax.random.key(0), {}, model, lambda: None)
    np.testing.assert_allclose(-loss, np.log(PRIOR @ laws()[:, SEEN]).sum(), rtol=1e-4)
