"""Every knob, in one place. Each can be set from the environment too, for runs whose code cannot be touched."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from harmony_lightning.errors import ConfigurationError
from harmony_lightning.units import parse_nbytes

SplitBatch = Callable[[Any, int], Sequence[Any]]
LossWeight = Literal["mean", "sum"] | Callable[[Any], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class HarmonyConfig:
    """What a user may choose; everything else is in the plan."""

    mode: Literal["auto", "pp", "dp"] = "auto"
    """pp deals packs over the GPUs, dp deals microbatches; auto is pp, which moves N times fewer bytes."""
    microbatch_size: int | Literal["auto"] = "auto"
    """Samples per microbatch; auto makes four microbatches per GPU, one where the host is the only device."""
    memory: str | int | Literal["auto"] = "auto"
    """What each GPU offers, such as "11GiB"; auto is all that is free, or an emulated GPU's own size."""
    stash: Literal["auto", "device", "host"] = "auto"
    """Where inputs of layers wait from forward to backward; auto is the host where there is one beside the device."""
    layers: Sequence[str | type] = field(default=())
    """The user's own choice of layers: module names, globs of names, or classes. Empty: found without help."""
    split_batch: SplitBatch | None = None
    """`split_batch(batch, num_microbatches)` cuts minibatches that no rule can cut."""
    loss_weight: LossWeight = "mean"
    """What a microbatch's loss counts. "mean" for a loss that is a mean over samples; "sum" for one that is a sum
    (`reduction="sum"`), so that microbatches are added up; a function of a microbatch that counts what the loss is the mean
    of, such as its tokens: `lambda batch: (batch["labels"] != -100).sum()`. One that counts 0 has no backward."""
    check_microbatches: bool = False
    """Run the first minibatch in one piece and in microbatches, in evaluation mode and without gradients, and raise a
    ConfigurationError if the losses differ by more than rounding. `training_step` is called for both, once."""

    def __post_init__(self) -> None:
        if self.mode not in ("auto", "pp", "dp"):
            raise ConfigurationError(f"mode must be 'auto', 'pp' or 'dp', got {self.mode!r}")
        if self.stash not in ("auto", "device", "host"):
            raise ConfigurationError(f"stash must be 'auto', 'device' or 'host', got {self.stash!r}")
        size = self.microbatch_size
        if size != "auto" and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
            raise ConfigurationError(f"microbatch_size must be 'auto' or a positive integer, got {size!r}")
        if self.memory != "auto":
            parse_nbytes(self.memory)
        if isinstance(self.layers, str | type):
            raise ConfigurationError(f"layers must be a list, got {self.layers!r}; write layers=[{self.layers!r}]")
        if self.split_batch is not None and not callable(self.split_batch):
            raise ConfigurationError(
                f"split_batch must be a function of (batch, num_microbatches), got {self.split_batch!r}"
            )

        if self.loss_weight not in ("mean", "sum") and not callable(self.loss_weight):
            raise ConfigurationError(
                f"loss_weight must be 'mean', 'sum' or a function of a microbatch, got {self.loss_weight!r}"
            )

    @property
    def memory_bytes(self) -> int | None:
        """The limit in bytes; None for auto."""
        return None if self.memory == "auto" else parse_nbytes(self.memory)


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """Defaults from `HARMONY_*` variables; arguments in code count more.

    HARMONY_MODE, HARMONY_MICROBATCH_SIZE, HARMONY_MEMORY, HARMONY_STASH set the knobs of those names;
    HARMONY_EMULATED_GPUS=4 trains on that many emulated GPUs of HARMONY_MEMORY each; HARMONY_CHECK=1 sets
    check_microbatches.
    """

    mode: str | None
    microbatch_size: str | None
    memory: str | None
    stash: str | None
    emulated_gpus: int | None
    check_microbatches: bool | None

    @classmethod
    def read(cls, variables: Mapping[str, str] = os.environ) -> "Environment":
        """Raises ConfigurationError if a number is none."""
        gpus = variables.get("HARMONY_EMULATED_GPUS")
        if gpus is not None and not gpus.isdecimal():
            raise ConfigurationError(f"HARMONY_EMULATED_GPUS must be a number of GPUs, got {gpus!r}")
        check = variables.get("HARMONY_CHECK")
        if check not in (None, "0", "1"):
            raise ConfigurationError(f"HARMONY_CHECK must be 0 or 1, got {check!r}")
        return cls(
            mode=variables.get("HARMONY_MODE"),
            microbatch_size=variables.get("HARMONY_MICROBATCH_SIZE"),
            memory=variables.get("HARMONY_MEMORY"),
            stash=variables.get("HARMONY_STASH"),
            emulated_gpus=int(gpus) if gpus else None,
            check_microbatches=None if check is None else check == "1",
        )

    def knobs(self) -> dict[str, Any]:
        """Arguments for `HarmonyConfig`."""
        knobs: dict[str, Any] = {
            name: value
            for name in ("mode", "microbatch_size", "memory", "stash", "check_microbatches")
            if (value := getattr(self, name)) is not None
        }
        if knobs.get("microbatch_size", "auto") != "auto":
            if not knobs["microbatch_size"].isdecimal():
                raise ConfigurationError(f"HARMONY_MICROBATCH_SIZE must be a number, got {knobs['microbatch_size']!r}")
            knobs["microbatch_size"] = int(knobs["microbatch_size"])
        return knobs
