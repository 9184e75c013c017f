"""Train an unchanged LightningModule that is larger than all GPUs: `Trainer(strategy="harmony")`.

The rooms of the house; each imports only rooms below it:

    cli             the command `harmony`
    strategy        `HarmonyStrategy`: each Lightning hook is one call into a room; enter at `strategy.mixin`.
                    `lightning` and `pytorch_lightning` hold the class for each of the two packages
    prepare         module -> plan, from sizes alone
    profiled        module and batch -> plan, by profile and search
    observability   what a run did
    scheduler       costs -> plan; simulation and search      runtime   carries a plan out; enter at `runtime.engine`
    plan            plans, schedules, task graphs and timelines, as data
    profiler        what each layer costs, and what the machine offers
    decomposer      module -> layers
    hardware        devices: CUDA, emulated, the host
    config, errors, units, record

Glossary:

    layer        a module that is swapped as a unit        pack        consecutive layers, swapped together
    minibatch    what the DataLoader yields                microbatch  a slice of it, run on its own
    segment      what a microbatch does in one visit to a pack
    stash        what waits from forward to backward       swap-in, swap-out  host to device and back
    glue         user code between layers                  lane        in-order queue of work on a device
    arena, slot  flat memory of a pack, host and device    placement   (pack, microbatch) -> device
    resident     a pack whose weights stay on their device, in a slot of their own
    narrow, wide weight in autocast's type off the host, or in the master's
    plan         every decision about a run                pp, dp      packs or microbatches dealt over the GPUs; mixed:
                                                                       both, in several pipelines, or single packs dealt
    schedule     a plan in terms of a profile's layers     turn        all microbatches of one pack, one way, in a step
    task         one copy or computation of a step         timeline    when each task starts and ends
"""

from typing import TYPE_CHECKING, Any

from harmony_lightning import autoload as _autoload

if TYPE_CHECKING:
    from harmony_lightning.config import HarmonyConfig
    from harmony_lightning.errors import (
        CapacityError,
        ConfigurationError,
        DeviceOutOfMemoryError,
        HarmonyError,
        RaceError,
        UnsupportedError,
    )
    from harmony_lightning.hardware.emulated import EmulatedCluster
    from harmony_lightning.lightning import HarmonyStrategy
    from harmony_lightning.observability.statistics import Statistics
    from harmony_lightning.plan import Pack, Plan

__version__ = "0.1.0"

__all__ = [
    "CapacityError",
    "ConfigurationError",
    "DeviceOutOfMemoryError",
    "EmulatedCluster",
    "HarmonyConfig",
    "HarmonyError",
    "HarmonyStrategy",
    "Pack",
    "Plan",
    "RaceError",
    "Statistics",
    "UnsupportedError",
]

# Names are loaded when they are asked for: torch imports this package to find its hook (`autoload`), and must neither
# wait for it nor be imported by it.
_HOMES = {
    **dict.fromkeys(("CapacityError", "ConfigurationError", "DeviceOutOfMemoryError"), "errors"),
    **dict.fromkeys(("HarmonyError", "RaceError", "UnsupportedError"), "errors"),
    "EmulatedCluster": "hardware.emulated",
    "HarmonyConfig": "config",
    "Pack": "plan",
    "Plan": "plan",
    "Statistics": "observability.statistics",
}


def __getattr__(name: str) -> Any:
    import importlib

    if name == "HarmonyStrategy":
        return importlib.import_module(_autoload.flavour_module()).HarmonyStrategy
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_autoload.install()
