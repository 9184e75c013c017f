"""Why a plan takes as long as it does, why the others lost, and what would help.

A step is as long as its critical path: tasks that each began just when the one before ended. Summed up by what they do,
they say where the seconds go; what binds is the largest part.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from harmony_lightning.plan.graph import COMPUTATIONS, NUM_LANES, Kind, Lane
from harmony_lightning.plan.schedule import Schedule
from harmony_lightning.record import Record
from harmony_lightning.scheduler.costs import Costs
from harmony_lightning.scheduler.fair import fair_times
from harmony_lightning.scheduler.runtime.steps import settled_steps
from harmony_lightning.scheduler.search.found import Found
from harmony_lightning.scheduler.search.runtime import is_simulated_fairly, search_runtime
from harmony_lightning.scheduler.search.schedules import search
from harmony_lightning.scheduler.simulate import Rules, simulate, task_graph
from harmony_lightning.units import format_nbytes

_PARTS = {
    Kind.WEIGHTS_IN: "weights",
    Kind.WEIGHT_GRADIENTS_OUT: "gradients",
    Kind.ALL_REDUCE: "gradients",
    Kind.UPDATE: "updates",
    Kind.RELEASE: "release",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Breakdown(Record):
    """Seconds of a step's critical path, by what its tasks do."""

    compute: float = 0.0
    weights: float = 0.0
    gradients: float = 0.0
    activations: float = 0.0
    updates: float = 0.0
    release: float = 0.0
    busy_share: float = 0.0
    """Of all devices' time, what they compute for."""

    @property
    def parts(self) -> tuple[tuple[str, float], ...]:
        """Largest first."""
        names = ("compute", "weights", "gradients", "activations", "updates", "release")
        return tuple(sorted(((name, getattr(self, name)) for name in names), key=lambda part: -part[1]))


def break_down(schedule: Schedule, costs: Costs, rules: Rules) -> Breakdown:
    """Where the seconds of one step go; under the runtime's rules of one in full flow, from the end of its first forward to
    that of the next step's."""
    last, begin = None, 0.0
    if rules is Rules.RUNTIME:
        graph, steps = settled_steps(schedule, costs)
        is_fair = is_simulated_fairly(schedule)  # as the search told its seconds
        timeline = fair_times(graph, costs.machine, dict(steps.updates.jobs)) if is_fair else simulate(graph)
        last, begin = steps.starts[-1], timeline.ends[steps.starts[-2]]
    else:
        timeline = simulate(task_graph(schedule, costs, rules))
    end = timeline.seconds if last is None else timeline.ends[last]
    tasks = timeline.graph.tasks

    def within(index: int) -> float:
        return max(0.0, min(timeline.ends[index], end) - max(timeline.starts[index], begin))

    seconds: dict[str, float] = {}
    for index in timeline.critical_path(last):
        if timeline.ends[index] < begin:
            break
        kind = Kind(tasks[index].kind)
        part = "compute" if kind in COMPUTATIONS else _PARTS.get(kind, "activations")
        seconds[part] = seconds.get(part, 0.0) + within(index)
    lanes = {lane for task in tasks for lane in task.lanes if lane % NUM_LANES == Lane.COMPUTE}
    busy = sum(within(index) for index, task in enumerate(tasks) if task.kind in COMPUTATIONS)
    return Breakdown(**seconds, busy_share=busy / (len(lanes) * (end - begin)) if end > begin else 0.0)


def bound_seconds(costs: Costs, minibatch: int, *, recompute: bool) -> float:
    """All computation of a step shared equally by all GPUs, at the microbatch size where it is fastest.

    With recompute, every layer's forward is counted twice, also that of a fused pack, which need not be.
    """

    def least(prefix: Callable[[int], Sequence[float]], measured: tuple[int, ...]) -> float:
        # Between sizes that were measured no sample takes less than at one of them.
        per_sample = (prefix(size)[-1] / size for size in {min(size, minibatch) for size in measured})
        return min(per_sample) * minibatch / costs.machine.gpus

    sizes = costs.profile.microbatch_sizes
    forward = least(costs.forward_prefix, sizes.forward) if recompute else 0.0
    return forward + least(costs.backward_prefix, sizes.backward)


def samples_to_hide(costs: Costs, schedule: Schedule, rules: Rules) -> dict[str, float]:
    """How many samples a step needs for its computation to take as long as what each step needs once, however many samples
    it has: bringing weights in, gradients out, and updating."""
    machine, devices, depth = costs.machine, schedule.num_devices, schedule.depth
    spans = schedule.packs_backward
    moving = [p for p in range(len(spans)) if schedule.num_copies > 1 or p not in schedule.updates_stay]

    def entering(p: int) -> float:
        """Once for forward and once for backward; of what stays only what trains, for forward."""
        whole, trained = costs.weight_bytes(spans[p]), costs.trained_bytes(spans[p])
        if p not in moving:  # what trains is there
            whole, trained = whole - trained, 0.0
        return trained if p in schedule.resident else 2 * whole

    # Updates on devices send as much: new weights instead.
    gradients = sum(costs.gradient_bytes(spans[p]) for p in moving)
    # The runtime's devices pass them on to each other, those of all pipelines at once.
    senders = devices if rules is Rules.RUNTIME and machine.peers_by_host else depth
    seconds = {
        "weights": sum(map(entering, range(len(spans)))) / machine.host_share(devices) / depth,
        "gradients": gradients / machine.host_share(senders) / depth,
        # The runtime has one worker, the rules of schedules one for each device.
        "updates": sum(costs.update_seconds(span) for p, span in enumerate(spans) if p not in schedule.updated_there)
        / (1 if rules is Rules.RUNTIME else devices),
    }
    per_sample = bound_seconds(costs, schedule.minibatch, recompute=True) / schedule.minibatch
    return {name: once / per_sample for name, once in seconds.items()}


def _advise_minibatch(needs: dict[str, float], minibatch: int) -> str:
    listed = ", ".join(f"{name} {samples:.3g}" for name, samples in sorted(needs.items(), key=lambda need: -need[1]))
    told = f"Samples that a step needs to hide what it needs once: {listed}; it has {minibatch}"
    if max(needs.values()) <= minibatch:
        return f"{told}, which is enough."
    times = math.ceil(max(needs.values()) / minibatch)
    travelling = max(needs["weights"], needs["gradients"])
    if travelling <= minibatch:
        return f"{told}: accumulate {times} minibatches (accumulate_grad_batches={times}), or make them as much larger."
    return f"{told}: make minibatches {times} times as large (accumulated ones would bring the weights each)."


def explain(
    found: Found,
    costs: Costs,
    *,
    minibatch: int,
    mode: Literal["pp", "dp", "auto"],
    memory_bytes: float,
    num_others: int = 3,
    search_again: Callable[[Costs, int, float], Found] | None = None,
    default: Found | None = None,
) -> Iterator[str]:
    """Sentences on what binds, why the others lost, and what would help. Searches again for the last: as `find`, unless
    another way is given to find the best for costs, samples and bytes. `default` is what that finds as things are, where
    `found` comes from another planner: unlike planners cannot be compared, and one that breeds takes seconds."""
    rules = Rules(found.rules)
    best = break_down(found.best.schedule, costs, rules)
    total = found.best.seconds
    listed = ", ".join(f"{name} {seconds:.4g} s" for name, seconds in best.parts if seconds > 0.0005 * total)
    yield f"The step's critical path: {listed}. GPUs compute {best.busy_share:.0%} of the time."
    name = best.parts[0][0]
    yield f"What binds is {name}: {_REMEDIES[name]}."
    yield _advise_minibatch(samples_to_hide(costs, found.best.schedule, rules), minibatch)
    for other in found.others[:num_others]:
        theirs = break_down(other.schedule, costs, rules)
        more = max(("compute", "weights", "gradients", "activations", "updates", "release"), key=lambda part: (
            getattr(theirs, part) - getattr(best, part)
        ))  # fmt: skip
        extra = getattr(theirs, more) - getattr(best, more)
        slower = other.seconds - total
        if slower < 5e-4 * total:
            yield f"{describe(other.schedule)} takes as long."
            continue
        yield (
            f"{describe(other.schedule)} takes {slower:.3g} s more: {extra:.3g} s more {more}, GPUs compute "
            f"{theirs.busy_share:.0%} of the time."
        )
    if default is not None:
        total = default.best.seconds
        yield f"What would help is told by plans of the default planner, whose present one takes {total:.4g} s."
    machine = costs.machine
    faster = replace(machine, host_link_bytes_per_second=2 * machine.host_link_bytes_per_second)
    for what, changed, samples, memory in (
        (f"twice the memory ({format_nbytes(2 * memory_bytes)} per GPU)", machine, minibatch, 2 * memory_bytes),
        ("a host link twice as fast", faster, minibatch, memory_bytes),
        (f"twice the minibatch ({2 * minibatch} samples)", machine, 2 * minibatch, memory_bytes),
    ):
        other_costs = costs.on(changed)
        if search_again is not None:
            again = search_again(other_costs, samples, memory)
        else:
            again = find(other_costs, minibatch=samples, mode=mode, memory_bytes=memory, rules=rules)
        gain = 1 - again.best.seconds / samples / (total / minibatch)
        yield f"With {what} a sample would take {gain:.1%} less time." if gain >= 5e-4 else f"With {what}: no gain."


def find(
    costs: Costs, *, minibatch: int, mode: Literal["pp", "dp", "auto"], memory_bytes: float, rules: Rules
) -> Found:
    """The best schedule under any rules. Raises as the searches do."""
    if rules is Rules.RUNTIME:
        return search_runtime(costs, minibatch=minibatch, mode=mode, memory_bytes=memory_bytes)
    return search(costs, minibatch=minibatch, mode=mode, memory_bytes=memory_bytes, rules=rules)


_REMEDIES = {
    "compute": "faster GPUs, more of them, or a larger minibatch to fill the pipeline would help",
    "weights": "a faster host link would help, or more microbatches per step, which share each copy of the weights",
    "gradients": "a faster host link would help, or more microbatches per step, which share each copy of the gradients",
    "activations": "faster links between GPUs and to the host would help",
    "updates": "a faster host would help, or more samples per step",
    "release": "fewer and larger packs would help, for which GPUs need more memory",
}


def describe(schedule: Schedule) -> str:
    """`pp, forward 8 packs of 2 samples, backward 9 packs of 2`: a schedule in a few words."""
    several = f", {schedule.pipelines} pipelines of {schedule.depth} GPUs" if schedule.pipelines > 1 else ""
    return (
        f"{schedule.mode}{several}, forward {len(schedule.packs_forward)} packs x {schedule.microbatch_forward} samples, "
        f"backward {len(schedule.packs_backward)} packs x {schedule.microbatch_backward}"
        f"{', the last one dealt' if schedule.dealt else ''}{_updates(schedule)}"
    )


def _updates(schedule: Schedule) -> str:
    """Where packs are updated, if not all on the host."""
    there, stay = len(schedule.updated_there), len(schedule.updates_stay)
    if not there:
        return ""
    travelling = f", states of {there - stay} come and go" if there > stay else ""
    return f", {there if there < len(schedule.packs_backward) else 'all'} updated on GPUs{travelling}"
