"""What the examples share before training: the command line, and a Trainer on real GPUs or on emulated ones.

The configuration decides everything (`conf/`); `${on_cuda:a,b}` in it is `a` on a machine with CUDA GPUs, else `b`.
"""

import sys

import lightning as L
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from harmony_lightning.units import parse_nbytes

OmegaConf.register_new_resolver(
    "on_cuda", lambda there, elsewhere: there if torch.cuda.is_available() else elsewhere, replace=True
)


def accept_flags(*names: str) -> None:
    """Let `--gpus 4` and `--gpus=4` mean Hydra's `gpus=4`, for each of `names`. To be called before Hydra parses."""
    arguments, rewritten = iter(sys.argv[1:]), []
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if flag.startswith("--") and name in names:
            argument = f"{name}={value if equals else next(arguments, '')}"
        rewritten.append(argument)
    sys.argv[1:] = rewritten


def make_trainer(cfg: DictConfig, *callbacks: L.Callback) -> L.Trainer:
    """The configured Trainer and strategy; an emulated cluster gives way where there are real GPUs."""
    if torch.cuda.is_available() and cfg.strategy.get("cluster"):
        cfg.strategy.cluster = None
    options = OmegaConf.to_container(cfg.trainer, resolve=True)
    return L.Trainer(strategy=instantiate(cfg.strategy), callbacks=list(callbacks), **options)


def gpu_nbytes(cfg: DictConfig, trainer: L.Trainer) -> tuple[int, ...]:
    """The memory that each GPU, real or emulated, offers to training; nothing where the host does the training."""
    if torch.cuda.is_available():
        if cfg.gpu_memory != "auto":
            return (parse_nbytes(cfg.gpu_memory),) * trainer.num_devices
        return tuple(torch.cuda.get_device_properties(index).total_memory for index in trainer.device_ids)
    cluster = cfg.strategy.get("cluster")
    return (parse_nbytes(cluster.memory),) * cluster.num_gpus if cluster else ()
