"""What a task is: a NumPyro model, ten observations, and draws from their posteriors.

The data are read by path from the wheel of the benchmark (sbibm 1.1.0, MIT licence; Lueckmann et
al. 2021, arXiv 2101.04653), which is fetched once and never imported; its pickles are not read.
"""

from __future__ import annotations

import bz2
import dataclasses
import functools
import zipfile
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jaxtyping import Array, Float
from numpyro import handlers
from numpyro.distributions.constraints import Constraint
from numpyro.infer.util import log_density

from models import download
from ppl.showing import shown

NUM_OBSERVATIONS = 10
BENCHMARK = download.WheelFile(
    requirement="sbibm==1.1.0",
    wheel_bytes=18_594_167,
    member=None,
    size=18_594_167,
    sha256="12ecc6b4d327b92f9225f08faa6405e4274fb8e75943d86a53157d1b1bcfaf74",
)


def latent(prior: dist.Distribution) -> Float[Array, " D"]:
    """The site "theta" of a model."""
    return jnp.asarray(numpyro.sample("theta", prior))


@shown
@dataclasses.dataclass(frozen=True)
class Task:
    """A problem with known answers: D parameters behind an observation of K numbers.

    Attributes:
        name: as the benchmark has it.
        model: takes nothing; samples the site "theta" [D], then the site "x" [K], whose law has a
            density.  `handlers.condition(task.model, {"x": x})` observes it.
        dim_theta, dim_x: D and K.
        prior, simulator: in words.
        density: of what "x" has a density, in words.
        folder: of the data in the wheel; some tasks share one.
        file: of it, the observation.
        edge: (theta [D], x [K]) -> a number that is zero where the density jumps inside the prior's
            support, smooth and positive elsewhere; None where it does not jump.
    """

    name: str
    model: Callable[[], None]
    dim_theta: int
    dim_x: int
    prior: str
    simulator: str
    density: str = "of x"
    folder: str = ""
    file: str = "observation.csv"
    edge: Callable[[Float[Array, " D"], Float[Array, " K"]], Float[Array, ""]] | None = None

    @property
    def support(self) -> Constraint:
        """Of the prior."""
        traced = handlers.trace(handlers.seed(self.model, jax.random.key(0))).get_trace()
        return traced["theta"]["fn"].support

    @functools.partial(jax.jit, static_argnums=0)
    def log_density(self, theta: Float[Array, " D"], x: Float[Array, " K"]) -> Float[Array, ""]:
        """log p(theta) p(x | theta); -inf outside of the prior's support."""
        total, sites = log_density(self.model, (), {}, {"theta": theta, "x": x})
        # Not every version of NumPyro says so by itself.
        return jnp.where(sites["theta"]["fn"].support(theta), total, -jnp.inf)

    def observation(self, num: int) -> Float[np.ndarray, " K"]:
        """The observation with this number, 1 to 10."""
        return self._read(num, self.file, (1, self.dim_x))[0]

    def true_parameters(self, num: int) -> Float[np.ndarray, " D"]:
        """What the observation was simulated from."""
        return self._read(num, "true_parameters.csv", (1, self.dim_theta))[0]

    def reference(self, num: int) -> Float[np.ndarray, "S D"]:
        """10,000 draws from the posterior of an observation, by the benchmark's authors."""
        name = "reference_posterior_samples.csv.bz2"
        return self._read(num, name, (10_000, self.dim_theta))

    def _read(self, num: int, name: str, shape: tuple[int, int]) -> np.ndarray:
        """A table of the benchmark; fetches the wheel the first time.

        Raises:
            ValueError: if there is no such observation, or the table has another shape.
            ConnectionError: if the wheel cannot be fetched.
        """
        if num not in range(1, NUM_OBSERVATIONS + 1):
            raise ValueError(
                f"expected the number of an observation, 1 to {NUM_OBSERVATIONS}, got {num}"
            )
        folder = f"sbibm/tasks/{self.folder or self.name}/files/num_observation_{num}"
        with zipfile.ZipFile(download.fetch_file(BENCHMARK)) as wheel:
            raw = wheel.read(f"{folder}/{name}")
        text = (bz2.decompress(raw) if name.endswith(".bz2") else raw).decode()
        table = np.loadtxt(text.splitlines(), np.float32, delimiter=",", skiprows=1, ndmin=2)
        if table.shape != shape:
            raise ValueError(f"expected a table {shape} in {folder}/{name}, got {table.shape}")
        return table
