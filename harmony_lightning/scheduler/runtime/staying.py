"""What would stay on the devices under a schedule that nobody has run yet: the rule by which the runtime decides that
(`residency`), on what the simulator knows of memory instead of a measured step.
"""

from dataclasses import replace

from harmony_lightning.plan import Held, Plan, Usage, VisitPeak
from harmony_lightning.plan.schedule import Schedule, split
from harmony_lightning.scheduler.costs import Costs
from harmony_lightning.scheduler.residency import let_stay
from harmony_lightning.scheduler.runtime.memory import visit_bytes


def with_what_stays(schedule: Schedule, plan: Plan, costs: Costs, *, moves_stash: bool = False) -> Schedule:
    """`plan` is that of the schedule; `moves_stash`: stashes go to the host whatever is left."""
    found = let_stay(plan, predicted_usage(schedule, plan, costs), moves_stash=moves_stash)
    names = [name for pack in plan.packs for name in pack.layers]
    return replace(
        schedule,
        resident=found.resident,
        stash_stays=found.stash_stays,
        keep=tuple(sorted(names.index(name) for name in found.keep)),
    )


def predicted_usage(schedule: Schedule, plan: Plan, costs: Costs) -> Usage:
    """Of a step under the schedule, whose plan is `plan`."""
    count, packs = schedule.num_devices, schedule.packs_backward
    sizes = split(schedule.minibatch, schedule.microbatch_backward)

    def here(pack: int, nbytes: dict[int, float]) -> tuple[int, ...]:
        """By device, of all microbatches of the pack: a sum over sizes on each device that it visits."""
        total = [0.0] * count
        for m, size in enumerate(sizes):
            total[plan.device(pack, m)] += nbytes[size]
        return tuple(map(round, total))

    visits = []
    found = list(visit_bytes(schedule, costs))
    found.sort(key=lambda visit: (visit.is_backward, -visit.pack if visit.is_backward else visit.pack))
    for visit in found:
        same = range(visit.device % schedule.depth, count, schedule.depth)
        by_device = tuple(round(visit.nbytes) if d in same else 0 for d in range(count))
        visits.append(VisitPeak(pack=visit.pack, nbytes=by_device))
    held = []
    for index, (span, pack) in enumerate(zip(packs, plan.packs, strict=True)):
        if schedule.stash == "host" and index + 1 < len(packs):
            stash = {size: costs.stash_bytes(size, span) for size in set(sizes)}
            held.append(Held(stashes=(index,), nbytes=here(index, stash)))
        for layer, name in zip(range(span[0], span[1] + 1), pack.layers, strict=True):
            kept = {size: costs.kept_bytes(size, layer) for size in set(sizes)}
            known = {size: nbytes for size, nbytes in kept.items() if nbytes is not None}
            if len(known) < len(kept):
                continue
            if index + 1 < len(packs):
                held.append(Held(layers=(name,), nbytes=here(index, known)))
            else:  # one microbatch at a time
                most = round(max(known.values()))
                held.append(
                    Held(layers=(name,), nbytes=tuple(most * (d in plan.visitors(index)) for d in range(count)))
                )
    return Usage(visits=tuple(visits), held=tuple(held), resting=(0,) * count)
