"""The ten tasks by name, in the order of the benchmark's paper (arXiv 2101.04653)."""

from __future__ import annotations

from . import gaussians, glm, odes, slcp, two_moons
from .task import Task

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        gaussians.GAUSSIAN_LINEAR,
        gaussians.GAUSSIAN_LINEAR_UNIFORM,
        slcp.SLCP,
        slcp.SLCP_DISTRACTORS,
        glm.BERNOULLI_GLM,
        glm.BERNOULLI_GLM_RAW,
        gaussians.GAUSSIAN_MIXTURE,
        two_moons.TWO_MOONS,
        odes.SIR,
        odes.LOTKA_VOLTERRA,
    )
}
