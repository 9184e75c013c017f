"""Which swap-ins the slots of a plan leave: the rule by which the runtime fills them, counted without running it.

A resident pack has a slot of its own. The others share slots: whatever comes takes an empty one, or that of the pack that
was used least recently, and what a slot holds stays good until somebody writes the masters. So the last packs of forward
are still there when backward begins with them, and frozen ones may be when the next step begins.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from harmony_lightning.plan.plan import Plan


def swap_ins(plan: "Plan", device: int) -> tuple[list[int], list[int]]:
    """Packs that a device brings in, in order: in the first step, and in each one behind it."""
    packs = [index for index in plan.packs_on(device) if device in plan.visitors(index)]
    visits = [*packs, *(index for index in reversed(packs) if plan.has_backward(index))]
    num_slots = plan.num_shared_slots(device)
    own: set[int] = set()
    shared: list[int] = []
    """Least recently used first."""

    def step() -> list[int]:
        brought = []
        for index in visits:
            if index in plan.resident:
                is_there = index in own
                own.add(index)
            else:
                is_there = index in shared
                if is_there:
                    shared.remove(index)
                elif len(shared) == num_slots:
                    del shared[0]
                shared.append(index)
            if not is_there:
                brought.append(index)
        frozen = {index for index in packs if not plan.packs[index].trainable_nbytes}
        own.intersection_update(frozen)
        shared[:] = [index for index in shared if index in frozen]
        return brought

    first = step()
    return first, step()
