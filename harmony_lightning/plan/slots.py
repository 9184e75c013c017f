"""Which swap-ins the slots of a plan leave: the rule by which the runtime fills them, counted without running it.

A resident pack has memory of its own. The slots of others share some: what a slot holds stays good until a pack comes
whose slot overlaps with it, or somebody writes the masters. So the last packs of forward are still there when backward
begins with them, and frozen ones may be when the next step begins.
"""

from collections.abc import Collection, Mapping, Sequence


def swap_ins(
    visits: Sequence[int], places: Mapping[int, tuple[int, int]], lasting: Collection[int]
) -> tuple[list[int], list[int]]:
    """Packs that a device brings in, in order: in the first step, and in each one behind it.

    Args:
        visits: packs that come to the device in one step, in order.
        places: where the slots of those that share memory begin and end, bytes.
        lasting: packs that nobody writes at the end of a step.
    """
    there: set[int] = set()

    def overlap(one: int, other: int) -> bool:
        return max(places[one][0], places[other][0]) < min(places[one][1], places[other][1])

    def step() -> list[int]:
        brought = []
        for index in visits:
            if index not in there:
                brought.append(index)
                if index in places:
                    there.difference_update([other for other in there if other in places and overlap(index, other)])
                there.add(index)
        there.intersection_update(lasting)
        return brought

    first = step()
    return first, step()
