"""The digits of scikit-learn, and a variational autoencoder of them.

1,797 handwritten digits of 8 x 8 pixels, each of which counts how many of 16 points are ink: a
binomial number.  The table is read from the wheel of scikit-learn (BSD licence), which is fetched
once and not imported.
"""

from __future__ import annotations

import dataclasses
import gzip
import io
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jaxtyping import Array, Float, PRNGKeyArray
from numpyro.contrib.module import eqx_module
from numpyro.infer import RenyiELBO, Trace_ELBO
from numpyro.infer.elbo import ELBO

from amortized.posteriors import flows, summaries
from amortized.variational import guides
from amortized.variational.losses import InfoVAE, ReweightedWakeSleep, StickingTheLanding
from models import download

WHEEL = download.WheelFile(
    requirement="scikit-learn==1.7.2",
    wheel_bytes=9_715_424,
    member="sklearn/datasets/data/digits.csv.gz",
    size=57_523,
    sha256="09f66e6debdee2cd2b5ae59e0d6abbb73fc2b0e0185d2e1957e9ebb51e23aa22",
)
POINTS, PIXELS, LATENTS, WIDTH = 16, 64, 2, 64


@dataclasses.dataclass(frozen=True)
class Method:
    """An objective, and whether the guide is a flow beyond a Gaussian."""

    objective: ELBO
    flow: flows.Family | None = None


METHODS: dict[str, Callable[[], Method]] = {
    "AEVB": lambda: Method(Trace_ELBO()),
    "landing": lambda: Method(StickingTheLanding()),
    "IWAE": lambda: Method(RenyiELBO(num_particles=10)),
    "InfoVAE": lambda: Method(InfoVAE(0.5, 200.0, site="z")),
    "wake-sleep": lambda: Method(ReweightedWakeSleep(10)),
    "flow": lambda: Method(Trace_ELBO(), flows.spline_coupling(num_layers=2, width=32)),
}


def digits() -> tuple[np.ndarray, np.ndarray]:
    """Pictures [1797, 64], numbers from 0 to 16, and which digits they are, in a fixed random
    order.
    """
    raw = gzip.decompress(download.fetch_file(WHEEL).read_bytes()).decode()
    table = np.loadtxt(io.StringIO(raw), np.float32, delimiter=",")
    table = table[np.random.default_rng(0).permutation(len(table))]
    return table[:, :PIXELS], table[:, PIXELS].astype(int)


def autoencoder(key: PRNGKeyArray, num: int) -> Callable[..., None]:
    """z ~ N(0, I), each pixel binomial given z by a network; of `num` pictures."""
    network = eqx.nn.MLP(LATENTS, PIXELS, WIDTH, 2, jax.nn.gelu, key=key)

    def model(x: Float[Array, "B 64"]) -> None:
        decoder: Any = eqx_module("decoder", network)
        with numpyro.plate("data", num, subsample_size=len(x)):
            z = numpyro.sample("z", dist.Normal(0, 1).expand([LATENTS]).to_event(1))
            logits = numpyro.deterministic("logits", jax.vmap(decoder)(z))
            numpyro.sample("x", dist.Binomial(POINTS, logits=logits).to_event(1), obs=x)

    return model


def encoder(
    key: PRNGKeyArray, model: Callable[..., None], x: np.ndarray, method: Method
) -> guides.Encoded:
    """q(z | x): a Gaussian whose mean and scales are a network's, or a flow from it."""
    summary = summaries.mlp(size=WIDTH, width=WIDTH, depth=1)
    data = {"x": jnp.asarray(x)}
    return guides.encoded(key, model, data, site="z", flow=method.flow, summary=summary)
