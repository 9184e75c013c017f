"""Every knob, in one place. Each can be set from the environment too, for runs whose code cannot be touched."""

import logging
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

    mode: Literal["auto", "pp", "dp", "mixed"] = "auto"
    """pp deals packs over the GPUs, dp deals microbatches. mixed deals both: by several `pipelines`, or packs, but of the
    last one microbatches, as forward and backward meet there, so that no GPU waits for another one's large head. auto is
    the fastest of all these where all is searched. Where it is not, auto is pp, which moves N times fewer bytes, and mixed
    deals the last pack. Gradients of packs whose microbatches are dealt are added up over each GPU's microbatches, then
    over GPUs."""
    pipelines: int | Literal["auto"] = "auto"
    """Of packs that are dealt over GPUs: so many pipelines side by side, each over as many GPUs, over which microbatches
    are dealt. auto is what makes steps fastest, where all is searched and mode is not pp; or else one."""
    microbatch_size: int | Literal["auto"] = "auto"
    """Samples per microbatch; auto takes the fastest where all is searched, or else makes four microbatches per
    GPU, one where the host is the only device."""
    microbatches_per_forward: int = 1
    """Microbatches that go through a layer's forward in one call, where it treats samples independently: larger kernels,
    for devices that small microbatches do not fill. Results are equal but for rounding; backward runs such a layer again
    as a whole."""
    memory: str | int | Literal["auto"] = "auto"
    """What each GPU offers, such as "11GiB"; auto is all that is free, or an emulated GPU's own size."""
    stash: Literal["auto", "device", "host"] = "auto"
    """Where inputs of layers wait from forward to backward; auto is the host where there is one beside the device,
    but for what is seen to fit on the device."""
    update: Literal["auto", "host", "device", "first"] = "auto"
    """Where the optimizer steps weights whose gradients are complete: on the host, or on the GPU that has the gradients,
    where the states of the optimizer are swapped in and out. "first" is the host but for the first pack of each GPU, where
    there is room for it: its gradients are the last to be complete and its weights the first to be needed, and the GPU
    waits meanwhile. Its weights and states stay there. Auto: where all is searched, for each pack what makes steps fastest
    in the memory there is, its states staying on the GPU or not; else the host. What must see all gradients first (clipping
    by norm, a scaler, hooks) is done on the host in any case."""
    one_layer_per_pack: bool = False
    """Swap every layer by itself, though several would fit: for tests with models that are smaller than any GPU."""
    layers: Sequence[str | type] = field(default=())
    """The user's own choice of layers: module names, globs of names, or classes. Empty: found without help."""
    split_batch: SplitBatch | None = None
    """`split_batch(batch, num_microbatches)` cuts minibatches that no rule can cut."""
    searches: Literal["packs", "all", "nothing"] = "all"
    """What is searched, by profiling the module, instead of made from sizes alone. "all", by `plan="auto"` of the strategy,
    its default: packs, how many come ahead, and microbatch size, mode and update where they are "auto"; the latter three
    stay where the module computes statistics of microbatches, or `Trainer(deterministic=True)` wants the same numbers in
    every run. "packs", by `plan="packs"`: results do not depend on these, so they are the same on GPUs of any size and
    speed. "nothing", by `plan="sizes"`."""
    planner: Literal["bounds", "genetic"] = "bounds"
    """Who searches. "bounds" looks at even packings, fewest seconds first by what they need at least; "genetic" breeds
    plans, by the same simulation and from the same question, for some seconds, and a log line tells the other's plan beside
    its own. It has no say where nothing is searched."""
    loss_weight: LossWeight = "mean"
    """What a microbatch's loss counts. "mean" for a loss that is a mean over samples; "sum" for one that is a sum
    (`reduction="sum"`), so that microbatches are added up; a function of a microbatch that counts what the loss is the mean
    of, such as its tokens: `lambda batch: (batch["labels"] != -100).sum()`. One that counts 0 has no backward. Where
    all do, they weigh as their samples: gradients are what your code makes of nothing to count, as on one device."""
    gradient_wire: Literal["exact", "half"] = "exact"
    """How gradients of weights that autocast casts leave the GPUs, in mixed precision. "exact": in float32 where several
    microbatches have been summed up, so that results are those of one device; "half": that sum rounded once to autocast's
    type, 2 bytes per weight. An element is then off by at most 2^-8 of itself for bfloat16; for float16 by 2^-11 of itself,
    by 2^-25 where it is below 2^-14, and beyond 65504 it is infinite, which the loss scaler looks out for."""
    check_microbatches: bool = False
    """Run the first minibatch in one piece and in microbatches, in evaluation mode and without gradients, and raise a
    ConfigurationError if the losses differ by more than rounding. `training_step` is called for both, once."""
    evaluation_batches: int = 1
    """How many successive batches of validation, test or prediction share one pass over the packs, so that weights are
    swapped in up to as many times less. Results are the same; a step must not depend on what another one leaves behind."""

    def __post_init__(self) -> None:
        if self.mode not in ("auto", "pp", "dp", "mixed"):
            raise ConfigurationError(f"mode must be 'auto', 'pp', 'dp' or 'mixed', got {self.mode!r}")
        if self.stash not in ("auto", "device", "host"):
            raise ConfigurationError(f"stash must be 'auto', 'device' or 'host', got {self.stash!r}")
        if self.gradient_wire not in ("exact", "half"):
            raise ConfigurationError(f"gradient_wire must be 'exact' or 'half', got {self.gradient_wire!r}")
        if self.update not in ("auto", "host", "device", "first"):
            raise ConfigurationError(f"update must be 'auto', 'host', 'device' or 'first', got {self.update!r}")
        if self.searches not in ("packs", "all", "nothing"):
            raise ConfigurationError(f"searches must be 'packs', 'all' or 'nothing', got {self.searches!r}")
        if self.planner not in ("bounds", "genetic"):
            raise ConfigurationError(f"planner must be 'bounds' or 'genetic', got {self.planner!r}")
        size = self.microbatch_size
        if size != "auto" and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
            raise ConfigurationError(f"microbatch_size must be 'auto' or a positive integer, got {size!r}")
        count = self.pipelines
        if count != "auto" and (not isinstance(count, int) or isinstance(count, bool) or count < 1):
            raise ConfigurationError(f"pipelines must be 'auto' or a positive integer, got {count!r}")
        if self.mode == "dp" and count not in ("auto", 1):
            raise ConfigurationError(f"pipelines are of pp and mixed, got {count} in mode 'dp'; leave them out")
        for name in ("evaluation_batches", "microbatches_per_forward"):
            number = getattr(self, name)
            if not isinstance(number, int) or isinstance(number, bool) or number < 1:
                raise ConfigurationError(f"{name} must be a positive integer, got {number!r}")
        if self.memory != "auto":
            parse_nbytes(self.memory)
        if not isinstance(self.one_layer_per_pack, bool):
            raise ConfigurationError(f"one_layer_per_pack must be True or False, got {self.one_layer_per_pack!r}")
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

    HARMONY_MODE, HARMONY_PIPELINES, HARMONY_MICROBATCH_SIZE, HARMONY_MEMORY, HARMONY_STASH, HARMONY_UPDATE, HARMONY_PLANNER
    set the knobs of those names, and HARMONY_PLAN the argument `plan` of the strategy: "auto", "packs", "sizes" or a file;
    HARMONY_ONE_LAYER_PER_PACK=1 (or 0), HARMONY_EVALUATION_BATCHES and HARMONY_GRADIENT_WIRE too, and HARMONY_CHECK=1 sets
    check_microbatches. HARMONY_EMULATED_GPUS=4 trains on that many emulated GPUs of HARMONY_MEMORY each, which
    are not strict; HARMONY_LOG_LEVEL=INFO (or DEBUG) tells each decision on stderr.
    """

    plan: str | None
    mode: str | None
    pipelines: str | None
    microbatch_size: str | None
    memory: str | None
    stash: str | None
    update: str | None
    planner: str | None
    one_layer_per_pack: bool | None
    emulated_gpus: int | None
    gradient_wire: str | None
    check_microbatches: bool | None
    evaluation_batches: str | None
    log_level: str | None

    @classmethod
    def read(cls, variables: Mapping[str, str] = os.environ) -> "Environment":
        """Raises ConfigurationError if a number, a switch or a level is none."""
        gpus = variables.get("HARMONY_EMULATED_GPUS")
        if gpus is not None and not gpus.isdecimal():
            raise ConfigurationError(f"HARMONY_EMULATED_GPUS must be a number of GPUs, got {gpus!r}")
        level = variables.get("HARMONY_LOG_LEVEL")
        if level is not None and level.upper() not in logging.getLevelNamesMapping():
            raise ConfigurationError(f"HARMONY_LOG_LEVEL must be a level such as INFO, got {level!r}")
        return cls(
            plan=variables.get("HARMONY_PLAN"),
            mode=variables.get("HARMONY_MODE"),
            pipelines=variables.get("HARMONY_PIPELINES"),
            microbatch_size=variables.get("HARMONY_MICROBATCH_SIZE"),
            memory=variables.get("HARMONY_MEMORY"),
            stash=variables.get("HARMONY_STASH"),
            update=variables.get("HARMONY_UPDATE"),
            planner=variables.get("HARMONY_PLANNER"),
            one_layer_per_pack=_switch(variables, "HARMONY_ONE_LAYER_PER_PACK"),
            emulated_gpus=int(gpus) if gpus else None,
            gradient_wire=variables.get("HARMONY_GRADIENT_WIRE"),
            check_microbatches=_switch(variables, "HARMONY_CHECK"),
            evaluation_batches=variables.get("HARMONY_EVALUATION_BATCHES"),
            log_level=level.upper() if level is not None else None,
        )

    def knobs(self) -> dict[str, Any]:
        """Arguments for `HarmonyConfig`."""
        names: tuple[str, ...] = ("mode", "pipelines", "microbatch_size", "memory", "stash", "update")
        names += ("one_layer_per_pack", "check_microbatches", "evaluation_batches", "gradient_wire", "planner")
        knobs: dict[str, Any] = {name: value for name in names if (value := getattr(self, name)) is not None}
        for name in ("pipelines", "microbatch_size", "evaluation_batches"):
            if name in knobs and knobs[name] != "auto":
                if not knobs[name].isdecimal():
                    raise ConfigurationError(f"HARMONY_{name.upper()} must be a number, got {knobs[name]!r}")
                knobs[name] = int(knobs[name])
        return knobs


def _switch(variables: Mapping[str, str], name: str) -> bool | None:
    value = variables.get(name)
    if value not in (None, "0", "1"):
        raise ConfigurationError(f"{name} must be 0 or 1, got {value!r}")
    return None if value is None else value == "1"
