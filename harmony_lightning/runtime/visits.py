"""Visits of packs: microbatches go through a pack on its devices, and then it makes room for the next one there."""

from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager

from harmony_lightning.plan import Plan
from harmony_lightning.runtime.microbatch import Microbatch
from harmony_lightning.runtime.state import RuntimeState


@contextmanager
def visit(state: RuntimeState, pack: int, visitors: Sequence[Microbatch], upcoming: dict[int, int]) -> Iterator[None]:
    """Some microbatches are in `pack`; `upcoming` tells the next pack by device, where it is known."""
    devices = dict.fromkeys(state.plan.device(pack, m.index) for m in visitors)
    leaving = [device for device in devices if upcoming.get(device, pack) != pack]
    state.weights.upcoming = {device: upcoming[device] for device in leaving}
    yield
    state.weights.upcoming = {}
    state.leave_pack()
    for device in leaving:
        state.weights.release(pack, device)
    if state.measuring.peaks is not None:
        state.measuring.peaks.end_visit(pack)


def next_in_forward(plan: Plan, pack: int, waiting: Sequence[Microbatch]) -> dict[int, int]:
    """By device, the pack that follows in the plan."""
    following: dict[int, int] = {}
    for later in range(pack + 1, len(plan.packs)):
        for microbatch in waiting:
            following.setdefault(plan.device(later, microbatch.index), later)
        if len(following) == plan.num_devices:
            break
    return following


def next_in_backward(
    plan: Plan, pack: int, waiting: Sequence[Microbatch], differentiated: Container[int]
) -> dict[int, int]:
    """By device, the pack that comes before in the plan, of those that are `differentiated`."""
    following: dict[int, int] = {}
    for earlier in reversed(range(pack)):
        if earlier in differentiated:
            for microbatch in waiting:
                following.setdefault(plan.device(earlier, microbatch.index), earlier)
            if len(following) == plan.num_devices:
                break
    return following
