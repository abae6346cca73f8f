"""The ten tasks of the public benchmark of simulation-based inference as NumPyro models, with draws
from their posteriors.

    from experiments.posterior_tasks import TASKS
    task = TASKS["two_moons"]
    x = task.observation(1)              # [K]
    draws = task.reference(1)            # [10000, D], from the posterior
    task.log_density(task.true_parameters(1), x)
"""

from .catalogue import TASKS
from .task import Task

__all__ = ["TASKS", "Task"]
