"""Which swap-ins the slots of a plan leave: the rule by which the runtime fills them, counted without running it.

A resident pack has memory of its own. The slots of others share some: what a slot holds stays good until a pack comes
whose slot overlaps with it, or somebody writes the masters. So the last packs of forward are still there when backward
begins with them, and frozen ones may be when the next step begins.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from harmony_lightning.plan.plan import Plan


def swap_ins(plan: "Plan", device: int) -> tuple[list[int], list[int]]:
    """Packs that a device brings in, in order: in the first step, and in each one behind it."""
    packs = [index for index in plan.packs_on(device) if device in plan.visitors(index)]
    visits = [*packs, *(index for index in reversed(packs) if plan.has_backward(index))]
    offsets = plan.slot_offsets(device)
    there: set[int] = set()

    def overlap(one: int, other: int) -> bool:
        ends = offsets[one] + plan.packs[one].slot_nbytes, offsets[other] + plan.packs[other].slot_nbytes
        return max(offsets[one], offsets[other]) < min(ends)

    def step() -> list[int]:
        brought = []
        for index in visits:
            if index not in there:
                brought.append(index)
                if index in offsets:
                    there.difference_update([other for other in there if other in offsets and overlap(index, other)])
                there.add(index)
        there.intersection_update([index for index in packs if not plan.packs[index].trainable_nbytes])
        return brought

    first = step()
    return first, step()
