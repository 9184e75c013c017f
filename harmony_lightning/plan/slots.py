"""Which swap-ins the slots of a plan leave: the rule by which the runtime fills them, counted without running it.

A resident pack has memory of its own. The slots of others share some: what a slot holds stays good until a pack comes
whose slot overlaps with it, or somebody writes the masters. So the last packs of forward are still there when backward
begins with them. At the end of a step what trains is written: of a pack that is still there when the next step comes to
it, that much comes again, and the frozen rest does not.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class SwapIns:
    """Packs that a device brings in, in order."""

    whole: list[int] = field(default_factory=list)
    trained: list[int] = field(default_factory=list)
    """Of these only the weights that train, if any do."""


def swap_ins(visits: Sequence[int], places: Mapping[int, tuple[int, int]]) -> tuple[SwapIns, SwapIns]:
    """What a device brings in: in the first step, and in each one behind it.

    Args:
        visits: packs that come to the device in one step, in order.
        places: where the slots of those that share memory begin and end, bytes.
    """
    there: set[int] = set()

    def overlap(one: int, other: int) -> bool:
        return max(places[one][0], places[other][0]) < min(places[one][1], places[other][1])

    def step() -> SwapIns:
        brought, written = SwapIns(), there.copy()
        for index in visits:
            if index not in there:
                brought.whole.append(index)
                if index in places:
                    there.difference_update([other for other in there if other in places and overlap(index, other)])
                there.add(index)
            elif index in written:
                brought.trained.append(index)
            written.discard(index)
        return brought

    first = step()
    return first, step()
