"""One process trains with all GPUs of the server; a cluster that has started several would get as many trainings."""

import os
from typing import Any

from harmony_lightning.errors import ConfigurationError


def check_one_task(environment: Any) -> None:
    """Args:
        environment: Lightning's cluster environment (SLURM, torchrun, MPI, LSF, ...).

    Raises:
        ConfigurationError: it has started more than one task.
    """
    try:
        num_tasks = environment.world_size()
    except KeyError:  # SLURM is named as a plugin, or asked for, but has not started this process
        num_tasks = 1
    if getattr(environment, "creates_processes_externally", False):
        # Lightning's own environment learns the number from the strategy, whoever has started the processes.
        declared = os.environ.get("WORLD_SIZE", "1")
        num_tasks = max(num_tasks, int(declared) if declared.isdecimal() else 1)
    if num_tasks > 1:
        raise ConfigurationError(
            f"{type(environment).__name__} has started {num_tasks} tasks, but with strategy='harmony' one process drives "
            f"all GPUs of the server, and each task would train a model of its own. Start one task that sees all GPUs: "
            f"python train.py; torchrun --nproc-per-node=1; srun --ntasks=1 --gpus-per-task=4"
        )
