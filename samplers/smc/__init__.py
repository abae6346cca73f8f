"""Sequential Monte Carlo over strings: `run`, and its thin, paper-named compositions.

    from samplers import smc
    smc.run(key, target, num_particles=64)

| module | what it runs |
| --- | --- |
| `sequential` | SMC itself; what it has is here under `smc` too |
| `distinct` | SMC whose particles are all different; what `run` does where there is a power |
| `importance` | SMC that never resamples |
| `particle_filtering`, `entropic` | process rewards |
| `power_smc`, `annealed` | powers raised as strings grow; along a ladder |
| `resample_move` | suffix moves in between |
| `conditional` | a pinned particle, and particle Gibbs |
| `pimh`, `bounds` | particle independent MH; log Z from both sides |
"""

from .sequential import (
    Method,
    Options,
    init,
    iterate,
    loop,
    method,
    result,
    run,
    step,
)

__all__ = [
    "Method",
    "Options",
    "init",
    "iterate",
    "loop",
    "method",
    "result",
    "run",
    "step",
]
