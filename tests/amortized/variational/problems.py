"""Models whose posteriors are known: a linear-Gaussian one, which is probabilistic PCA, and one of
a few symbols, which is enumerated.
"""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro import handlers

NUM = 12  # data
WEIGHT = np.array([[1.0, 0.8], [-0.5, -0.3], [0.2, 1.0]], np.float32)
BIAS = np.array([0.5, -1.0, 0.2], np.float32)
NOISE = 0.6
COVARIANCE = np.linalg.inv(WEIGHT.T @ WEIGHT / NOISE**2 + np.eye(2))
GAIN = COVARIANCE @ WEIGHT.T / NOISE**2
SYMBOLS = np.array([0, 1, 2, 2, 1], np.int32)  # data of the discrete model, not alike in number


def pca(x: Any) -> None:
    """z ~ N(0, I), x ~ N(W z + b, s^2 I), of which W is learned."""
    weight = numpyro.param("weight", jnp.asarray(WEIGHT))
    with numpyro.plate("data", NUM, subsample_size=len(x)):
        z = numpyro.sample("z", dist.Normal(0, 1).expand([2]).to_event(1))
        numpyro.sample("x", dist.Normal(z @ weight.T + BIAS, NOISE).to_event(1), obs=x)


def pca_guide(x: Any) -> None:
    """q(z | x) = N(G (x - b), C), exact as it starts."""
    gain = numpyro.param("gain", jnp.asarray(GAIN, jnp.float32))
    factor = jnp.asarray(np.linalg.cholesky(COVARIANCE), jnp.float32)
    factor = numpyro.param("factor", factor, constraint=dist.constraints.lower_cholesky)
    with numpyro.plate("data", NUM, subsample_size=len(x)):
        loc = (x - BIAS) @ gain.T
        numpyro.sample("z", dist.MultivariateNormal(loc, scale_tril=factor))


def pca_data() -> Any:
    """[NUM, 3]."""
    rng = np.random.default_rng(0)
    z, noise = rng.normal(size=(NUM, 2)), NOISE * rng.normal(size=(NUM, 3))
    return jnp.asarray(z @ WEIGHT.T + BIAS + noise, jnp.float32)


def pca_log_likelihood(x: Any) -> np.ndarray:
    """log N(x; b, W W' + s^2 I), in double precision [N]."""
    covariance = WEIGHT @ WEIGHT.T.astype(np.float64) + NOISE**2 * np.eye(3)
    rest = np.asarray(x, np.float64) - BIAS
    squares = np.einsum("ni,ij,nj->n", rest, np.linalg.inv(covariance), rest)
    return -0.5 * (squares + np.linalg.slogdet(2 * np.pi * covariance)[1])


PRIOR = np.array([0.3, 0.7])
LIKELIHOOD = np.array([[0.6, 0.3, 0.1], [0.1, 0.25, 0.65]])
START = np.array([0.4, -0.3, 0.8], np.float32)
JOINT = PRIOR[:, None] * LIKELIHOOD  # [Z, X]
POSTERIOR = (JOINT / JOINT.sum(0))[1]  # p(z = 1 | x) [X]


def symbols(x: Any) -> None:
    """Two components, three symbols; the likelihood is a parameter."""
    logits = numpyro.param("likelihood", jnp.log(jnp.asarray(LIKELIHOOD, jnp.float32)))
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Categorical(jnp.asarray(PRIOR, jnp.float32)))
        numpyro.sample("x", dist.Categorical(logits=logits[z]), obs=x)


def symbols_guide(x: Any) -> None:
    """q(z = 1 | x), a number for each symbol."""
    logit = numpyro.param("logit", jnp.asarray(START))
    with numpyro.plate("data", len(x)):
        numpyro.sample("z", dist.Categorical(logits=jnp.stack([-logit, logit], 1)[x] / 2))


def exact_logit() -> Any:
    """The logits of the exact posterior."""
    return jnp.asarray(np.log(POSTERIOR / (1 - POSTERIOR)), jnp.float32)


def enumerated(loss: Any, x: Any, logit: Any) -> Any:
    """E over all latents of the data, as the guide has them, of the loss of a guide that draws
    them.
    """
    q = jax.nn.sigmoid(logit)[x]
    every = jnp.array(list(itertools.product([0, 1], repeat=len(x))))

    def one(z: Any) -> Any:
        fixed = handlers.substitute(symbols_guide, {"z": z})
        return jnp.prod(jnp.where(z == 1, q, 1 - q)) * loss(fixed)

    return jax.vmap(one)(every).sum()
