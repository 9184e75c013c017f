"""The search: the best schedule of a large family, proved best by bounds rather than hoped for.

The family joins every packing of `packings` for backward with every one for forward, at every microbatch size. It does
not depend on memory or on links: memory only rules members out, and each member's seconds only grow when a link gets
slower. Where the best of the family is proved (`Found.is_proved`), more memory or a faster link never makes a plan worse.

Where nothing is proved within a limited effort, more memory never makes a plan worse, either: walks are made again for less
and less memory, at *rungs*, amounts that are always the same, until nothing below can be faster (`walk`). And `auto`, which
walks through both modes with the same effort for each, is never slower than either.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal

from harmony_lightning.errors import CapacityError, ConfigurationError
from harmony_lightning.plan.schedule import Schedule
from harmony_lightning.scheduler.costs import Costs
from harmony_lightning.scheduler.rules.memory import turn_bytes
from harmony_lightning.scheduler.rules.turns import turns
from harmony_lightning.scheduler.search.bounds import Boundary, Setting
from harmony_lightning.scheduler.search.found import Found
from harmony_lightning.scheduler.search.packings import Packings, families
from harmony_lightning.scheduler.search.walk import RUNG, Seen, Walk
from harmony_lightning.scheduler.simulate import Rules, peak_bytes
from harmony_lightning.units import format_nbytes

Mode = Literal["pp", "dp"]


def search(
    costs: Costs,
    *,
    minibatch: int,
    mode: Literal["pp", "dp", "auto"],
    memory_bytes: float,
    rules: Rules,
    packings: Sequence[Packings] | None = None,
) -> Found:
    """The fastest schedule whose peak is at most `memory_bytes` on each GPU.

    Args:
        packings: `families(costs)`, to share them between searches.

    Raises:
        CapacityError: no schedule fits, with the layer that needs most.
        ConfigurationError: the minibatch is empty, or the mode unknown.
    """
    if minibatch < 1:
        raise ConfigurationError(f"the minibatch must have at least one sample, got {minibatch}")
    if mode not in ("pp", "dp", "auto"):
        raise ConfigurationError(f"mode must be 'pp', 'dp' or 'auto', got {mode!r}")
    started = time.perf_counter()
    modes: tuple[Mode, ...] = ("pp", "dp") if mode == "auto" else (mode,)
    seen = Seen(costs, rules, memory_bytes)
    rung = math.floor(math.log(max(memory_bytes, 1.0)) / math.log(RUNG))
    walks = [
        Walk(tuple(_settings(costs, rules, one, minibatch)), one, minibatch, family, rung)
        for family in packings or families(costs)
        for one in modes
    ]
    incomplete = [walk for walk in walks if not walk.run(rung, seen)]
    is_proved = not incomplete
    while incomplete:
        rung -= 1
        incomplete = [walk for walk in incomplete if not walk.run(rung, seen)]
    found = sorted(seen.best.values(), key=lambda c: c.seconds)
    if not found:
        raise CapacityError(_too_large(costs, modes[0], minibatch, memory_bytes, rules))
    return Found(
        rules=str(rules),
        best=found[0],
        others=tuple(found[1:]),
        num_schedules=sum(walk.num_schedules for walk in walks),
        num_simulated=seen.num_simulated,
        is_proved=is_proved,
        search_seconds=time.perf_counter() - started,
    )


def _settings(costs: Costs, rules: Rules, mode: Mode, minibatch: int) -> Iterator[Setting]:
    """With what our rules leave open, best first."""
    gpus = costs.machine.gpus
    setting = Setting(
        costs=costs,
        rules=rules,
        is_pp=mode == "pp" and gpus > 1,
        num_devices=min(gpus, minibatch) if mode == "dp" else gpus,
        samples=-(-minibatch // gpus) if mode == "dp" else minibatch,
    )
    if rules is not Rules.OWN:
        yield replace(setting, prefetch=0)
        return
    boundaries: tuple[Boundary, ...] = ("device",) if setting.is_pp else ("device", "host")
    yield from (replace(setting, prefetch=p, boundary=boundary) for p in (1, 0) for boundary in boundaries)


def _too_large(costs: Costs, mode: Mode, minibatch: int, memory_bytes: float, rules: Rules) -> str:
    """What even the smallest packs and microbatches need."""
    sizes, num_layers = costs.profile.microbatch_sizes, costs.num_layers
    packs = tuple((layer, layer) for layer in range(num_layers))
    smallest = Schedule(
        mode=mode,
        num_devices=costs.machine.gpus,
        minibatch=minibatch,
        microbatch_forward=sizes.forward[0],
        packs_forward=packs[:-1],
        microbatch_backward=sizes.backward[0],
        packs_backward=packs,
    )
    largest = max(turns(smallest), key=lambda turn: (turn_bytes(smallest, costs, turn), -turn.span[0]))
    alone, peak = turn_bytes(smallest, costs, largest), peak_bytes(smallest, costs, rules)
    beside = f" and {format_nbytes(peak - alone)} beside it" if peak > alone else ""
    return (
        f"no schedule fits: with packs of one layer and microbatches of {sizes.backward[0]}, layer {largest.span[0]} needs "
        f"{format_nbytes(alone)}{beside}, but each GPU offers {format_nbytes(memory_bytes)}; raise memory, or split that "
        f"layer"
    )
