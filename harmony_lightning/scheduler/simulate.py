"""What a schedule takes, in seconds and bytes, under Harmony's rules or under our own, and the timeline behind it."""

import enum
from dataclasses import dataclass

from harmony_lightning.plan.graph import TaskGraph, TaskTimes
from harmony_lightning.plan.schedule import Schedule
from harmony_lightning.record import Record
from harmony_lightning.scheduler.clock import Clock, Listener, Recorder
from harmony_lightning.scheduler.costs import Costs
from harmony_lightning.scheduler.rules.harmony import tell_harmony
from harmony_lightning.scheduler.rules.memory import harmony_peak_bytes, own_peak_bytes
from harmony_lightning.scheduler.rules.own import OwnSteps
from harmony_lightning.scheduler.runtime.memory import runtime_peak_bytes
from harmony_lightning.scheduler.runtime.steps import RuntimeSteps, runtime_seconds


class Rules(enum.StrEnum):
    """How a schedule is carried out."""

    HARMONY = "harmony"
    """As Harmony's simulator counts, copies and computations overlapping."""
    HARMONY_SERIAL = "harmony-serial"
    """The same, without overlap."""
    OWN = "own"
    """As our runtime could with every ability that a schedule has."""
    RUNTIME = "runtime"
    """As the runtime carries a plan out now: the same packs both ways, one microbatch size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Score(Record):
    """What one step takes."""

    seconds: float
    """From the first copy to the last update."""
    peak_bytes: float
    """The most that any device holds."""


def score(schedule: Schedule, costs: Costs, rules: Rules) -> Score:
    """Simulate one step.

    Raises:
        ConfigurationError: the schedule has microbatches that are larger than any that were profiled.
    """
    return Score(seconds=seconds(schedule, costs, rules), peak_bytes=peak_bytes(schedule, costs, rules))


def seconds(schedule: Schedule, costs: Costs, rules: Rules) -> float:
    """From the first copy to the last update of one step, under Harmony's rules and our own to the nanosecond: steps that
    take as long take exactly as long, in whatever order their parts are added up.

    The next step cannot be earlier: its first forward waits for the last update, that of the first layers.
    """
    if rules is Rules.RUNTIME:
        return runtime_seconds(schedule, costs)
    clock = Clock(schedule.num_devices)
    tell(schedule, costs, rules, clock)
    return round(clock.seconds, 9)


def peak_bytes(schedule: Schedule, costs: Costs, rules: Rules) -> float:
    """The most bytes that any device holds."""
    if rules is Rules.RUNTIME:
        return runtime_peak_bytes(schedule, costs)
    return own_peak_bytes(schedule, costs) if rules is Rules.OWN else harmony_peak_bytes(schedule, costs)


def task_graph(schedule: Schedule, costs: Costs, rules: Rules) -> TaskGraph:
    """Every copy and computation of one step."""
    recorder = Recorder(schedule.num_devices)
    tell(schedule, costs, rules, recorder)
    return recorder.graph


def tell(schedule: Schedule, costs: Costs, rules: Rules, listener: Listener) -> None:
    """Tell the tasks of one step to a listener, each after those that it waits for."""
    if rules is Rules.OWN:
        OwnSteps(schedule, costs, listener).step()
    elif rules is Rules.RUNTIME:
        RuntimeSteps(schedule, costs, listener).step()
    else:
        tell_harmony(schedule, costs, listener, overlap=rules is Rules.HARMONY)


def simulate(graph: TaskGraph) -> TaskTimes:
    """When each task of a graph starts and ends: as soon as its lanes are free and what it waits for is done."""
    clock = Clock(graph.num_devices)
    starts: list[float] = []
    ends: list[float] = []
    for task in graph.tasks:
        end = max((clock.free[lane] for lane in task.lanes), default=0.0)
        end = max(end, max((ends[before] for before in task.after), default=0.0)) + task.seconds
        for lane in task.lanes:
            clock.free[lane] = end
        starts.append(end - task.seconds)
        ends.append(end)
    return TaskTimes(graph=graph, starts=tuple(starts), ends=tuple(ends))
