"""How many bytes a schedule needs on each device.

As Harmony counts: while a turn computes, the device holds the pack with its activations, and beside that an input that is
on its way in, an output on its way out, and stashes. Our rules add what is on the way meanwhile: the next pack's weights,
the former pack's gradients, and in dp the outputs that wait for the next pack.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence

from harmony_lightning.plan.schedule import Schedule, Span
from harmony_lightning.scheduler.costs import Costs
from harmony_lightning.scheduler.rules.turns import Turn, turns


def forward_bytes(costs: Costs, size: int, span: Span, stash_layers: Sequence[int] = ()) -> float:
    """Peak of a forward turn."""
    stash = sum(costs.input_bytes(size, layer) for layer in stash_layers)
    boundary = costs.input_bytes(size, span[0]) + costs.input_bytes(size, span[1] + 1)
    return boundary + costs.forward_compute_bytes(size, span) + stash


def backward_bytes(costs: Costs, size: int, span: Span) -> float:
    """Peak of a backward turn: two inputs, the gradient of the output, that of the input."""
    entering = costs.input_bytes(size, span[0])
    gradient = entering if span[0] > 0 else 0.0
    return 2 * entering + costs.input_bytes(size, span[1] + 1) + costs.backward_compute_bytes(size, span) + gradient


def turn_bytes(schedule: Schedule, costs: Costs, turn: Turn) -> float:
    """What one turn needs by itself, as Harmony counts."""
    if turn.is_forward:
        firsts = [first for first, _ in schedule.packs_backward]
        stashes = firsts[bisect_left(firsts, turn.span[0]) : bisect_right(firsts, turn.span[1])]
        return forward_bytes(costs, schedule.sizes_forward[0], turn.span, stashes)
    return backward_bytes(costs, schedule.sizes_backward[0], turn.span)


def harmony_peak_bytes(schedule: Schedule, costs: Costs) -> float:
    """The most that any device holds under Harmony's rules."""
    return max(turn_bytes(schedule, costs, turn) for turn in turns(schedule))


def own_peak_bytes(schedule: Schedule, costs: Costs) -> float:
    """The most that any device holds under our rules."""
    peak = 0.0
    needs: dict[int, float] = {}
    for turn in turns(schedule):
        if schedule.prefetch and turn.left is not None:
            # The turn before still computes while these weights arrive.
            peak = max(peak, needs[turn.device] + costs.state_bytes(turn.span))
        need = turn_bytes(schedule, costs, turn)
        if schedule.prefetch and turn.left is not None and not turn.left.is_forward:
            need += costs.weight_bytes(turn.left.span)
        if schedule.boundary == "device" and (schedule.mode == "dp" or schedule.num_devices == 1):
            # Microbatches that have not been here yet wait before the pack, the others behind it.
            layers = turn.span[0], turn.span[1] + 1
            need += max(costs.input_bytes(schedule.samples, layer) for layer in layers if layer > 0)
        needs[turn.device] = need
        peak = max(peak, need)
    return peak
