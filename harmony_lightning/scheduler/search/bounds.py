"""Lower bounds on what schedules take, for many at once.

A search that wants the best of a million schedules cannot simulate them all. Here a turn is a few numbers: how long its
weights take to come, its first microbatch, all of them, and what follows the last one. Everything else of a step is left
out, so a bound never exceeds what the simulation says; as compute and weights are nearly all of a step, it is close.

    start(turn)  >=  end(turn before on the device)  and what the rules put between the two
    start(turn)  >=  first microbatch of the former turn done, and sent
    end(turn)    >=  last microbatch of the former turn done, sent, and computed here
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal

import numpy as np
import numpy.typing as npt

from harmony_lightning.plan.schedule import split
from harmony_lightning.scheduler.costs import Costs
from harmony_lightning.scheduler.search.packings import Packing
from harmony_lightning.scheduler.simulate import Rules

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Boundary = Literal["device", "host"]
Choice = tuple[int, Packing]
"""Microbatch size and packing, of one direction."""

_ROUNDING = 1 - 1e-12
"""Sums are rounded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What all schedules of one search have in common."""

    costs: Costs
    rules: Rules
    is_pp: bool
    """False in dp, and for a single device in any mode: it exchanges everything with the host."""
    num_devices: int
    samples: int
    """Of one step on one device."""
    prefetch: int = 1
    boundary: Boundary = "device"
    """What our rules leave open, as in `Schedule`; Harmony's know neither."""

    @property
    def is_by_host(self) -> bool:
        """Whether what one pack hands to the next goes by way of the host."""
        return self.rules is Rules.OWN and not self.is_pp and self.boundary == "host"

    @property
    def stride(self) -> int:
        """Devices that take turns."""
        return self.num_devices if self.is_pp else 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Turns:
    """Turns of some packings of one direction, [packing, turn] in order of execution; turns that are not there cost 0."""

    counts: Ints
    """[packing]"""
    coming: Floats
    """Seconds in which the weights come."""
    entering: Floats
    """Seconds in which one microbatch comes from the former turn."""
    first: Floats
    """The first microbatch, recompute included."""
    late: Floats
    """The part of it that waits for the former turn."""
    last: Floats
    """Of the last microbatch: coming from the former turn, and that part."""
    total: Floats
    """All microbatches."""
    leaving: Floats
    """From the last microbatch to when the device is free for the next turn."""
    sent: Floats
    """From the last microbatch to when its gradients are on the host; 0 in forward."""
    update: Floats
    """Seconds of the update; 0 in forward."""
    inputs: Floats
    """Seconds for which inputs of all microbatches occupy the lane on which weights come."""

    def rows(self, rows: Ints) -> "Turns":
        return Turns(**{name: getattr(self, name)[rows] for name in Turns.__slots__})


def needs(settings: Sequence[Setting], direction: str, choices: Sequence[Choice]) -> Floats:
    """Bytes that no schedule with a choice does without, [setting, choice]: of the pack that needs most, stashes left out
    that packs of the other direction ask for. Under our rules what else is there meanwhile counts, among packs of this
    direction."""
    found = np.zeros((len(settings), len(choices)))
    costs, most = settings[0].costs, settings[0].samples
    for size, members in _by_size(choices).items():
        counts = np.array([len(choices[row][1]) for row in members])
        start, end = _layers([choices[row][1] for row in members])
        samples = min(size, most)
        peaks, inputs = np.array(costs.peak_prefix(direction, samples)), np.array(costs.inputs(samples))
        alone = peaks[end] - peaks[start] + 2 * inputs[start] + inputs[end]
        if direction == "backward":
            alone += np.where(start > 0, 2.0, 1.0) * inputs[start]
        rows = np.array(members, dtype=np.int64)
        used, begins = rows[counts > 0], (np.cumsum(counts) - counts)[counts > 0]
        for place, setting in enumerate(settings):
            nbytes = alone
            if setting.rules is Rules.OWN:
                nbytes = _with_abilities(setting, direction, alone, start, end, counts)
            if len(used):
                found[place, used] = np.maximum.reduceat(nbytes, begins)
    return found


def _with_abilities(setting: Setting, direction: str, nbytes: Floats, start: Ints, end: Ints, counts: Ints) -> Floats:
    """Bytes while each pack computes, as `rules.memory.own_peak_bytes` counts them: in dp what is handed over on the
    device, and with prefetch the next one's weights and the gradients of the one before. Packs of one choice are in a
    row."""
    costs, stride = setting.costs, setting.stride
    weights, states = np.array(costs.weight_prefix), np.array(costs.state_prefix)
    if not setting.is_pp and setting.boundary == "device":
        waiting = np.array(costs.inputs(setting.samples))
        nbytes = nbytes + np.maximum(np.where(start > 0, waiting[start], 0.0), waiting[end])
    if not setting.prefetch:
        return nbytes
    place = np.arange(len(start)) - np.repeat(np.cumsum(counts) - counts, counts)
    if direction == "forward":
        has_next = place + stride < np.repeat(counts, counts)
        coming = np.minimum(np.arange(len(start)) + stride, len(start) - 1)
    else:
        has_next = place - stride >= 0
        coming = np.maximum(np.arange(len(start)) - stride, 0)
        has_left = place + stride < np.repeat(counts, counts)
        left = np.minimum(np.arange(len(start)) + stride, len(start) - 1)
        nbytes = nbytes + np.where(has_left, weights[end[left]] - weights[start[left]], 0.0)
    return np.asarray(nbytes + np.where(has_next, states[end[coming]] - states[start[coming]], 0.0))


def measure(setting: Setting, direction: str, choices: Sequence[Choice]) -> Turns:
    """Turns of choices, in the order of execution."""
    counts = np.array([len(packing) for _, packing in choices], dtype=np.int64)
    shape = (len(choices), max(1, int(counts.max(initial=0))))
    columns = {name: np.zeros(shape) for name in Turns.__slots__ if name != "counts"}
    step = 1 if direction == "forward" else -1
    for size, members in _by_size(choices).items():
        start, end = _layers([choices[row][1][::step] for row in members])
        lengths = counts[members]
        turn = np.arange(len(start)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        at = np.repeat(members, lengths) * shape[1] + turn
        host = np.repeat(_host_shares(setting, direction, lengths), lengths)
        for name, values in _columns(setting, direction, size, start, end, host).items():
            columns[name].ravel()[at] = values
    return Turns(counts=counts, **columns)


def _host_shares(setting: Setting, direction: str, counts: Ints) -> Floats:
    """Host-link bytes per second of each device, at least as many as it will have: with fewer turns than devices only some
    are at work, and the packs of the other direction are not known yet."""
    machine, most = setting.costs.machine, setting.num_devices
    shares = np.array([machine.host_share(active) for active in range(most + 1)])
    if not setting.is_pp:
        return np.full(len(counts), shares[most])
    others = 1 if direction == "forward" else counts > 1
    return np.asarray(shares[np.minimum(counts + others, most)])


def _by_size(choices: Sequence[Choice]) -> dict[int, list[int]]:
    members: dict[int, list[int]] = {}
    for row, (size, _) in enumerate(choices):
        members.setdefault(size, []).append(row)
    return members


def _layers(packings: Sequence[Packing]) -> tuple[Ints, Ints]:
    """First layer of each pack, and the one behind it."""
    flat = np.fromiter(chain.from_iterable(chain.from_iterable(packings)), dtype=np.int64)
    return flat[0::2], flat[1::2] + 1


def _columns(setting: Setting, direction: str, size: int, start: Ints, end: Ints, host: Floats) -> dict[str, Floats]:
    """The columns of `Turns`, for packs of layers from `start` to before `end`."""
    costs, machine, num_devices = setting.costs, setting.costs.machine, setting.num_devices
    sizes = split(setting.samples, size)
    size = sizes[0]
    is_backward, is_fused = direction == "backward", end == costs.num_layers

    def between(prefix: Sequence[float]) -> Floats:
        sums = np.asarray(prefix)
        return np.asarray(sums[end] - sums[start])

    def microbatch(samples: int) -> tuple[Floats, Floats, Floats, Floats]:
        """Seconds of one: coming from the former turn, copying only, computing before it must have come, and after."""
        inputs = np.array(costs.inputs(samples))
        # Behind the last layer nothing comes back, so a fused pack's gradient is 0 bytes; its input comes as in forward.
        takes_input = is_fused | (not is_backward)
        nbytes = np.where(takes_input, inputs[start], inputs[end])
        by_peer = setting.is_pp & ~(takes_input & (start == 0))
        entering = np.where(by_peer, nbytes / machine.peer_bytes_per_second, 0.0)
        if setting.is_by_host:
            entering = np.where(takes_input & (start == 0), 0.0, 2 * nbytes / host)  # out, and in
        # With another cut than forward's the input of the fused pack comes by way of the host.
        entering = np.where(is_fused & is_backward, np.minimum(entering, nbytes / host), entering)
        copying = np.zeros(len(start))
        if setting.rules is Rules.HARMONY_SERIAL:
            stash = np.where(takes_input, 0.0, inputs[start])
            leaving = np.where(start > 0, inputs[start], 0.0) if is_backward else inputs[end]
            copying = entering + (stash + np.where(by_peer, 0.0, nbytes) + (0.0 if setting.is_pp else leaving)) / host
        forward = between(costs.forward_prefix(samples))
        if not is_backward:
            return entering, copying, np.zeros(len(start)), forward
        both = np.maximum(forward, between(costs.backward_prefix(samples)))
        return entering, copying, forward, both - forward

    entering, copying, early, late = microbatch(size)
    last_entering, last_copying, last_early, last_late = microbatch(sizes[-1])
    state, inputs = between(costs.state_prefix), np.array(costs.inputs(size))
    release = 0.0 if setting.rules is Rules.OWN else machine.release_seconds
    sent = update = leaving = by_host = np.zeros(len(start))
    if setting.rules is Rules.OWN:
        all_inputs = (len(sizes) - 1) * inputs + np.array(costs.inputs(sizes[-1]))
        by_host = np.where((start == 0) | setting.is_by_host | (is_backward & ~is_fused), all_inputs[start], 0.0) / host
        if setting.is_by_host and is_backward:
            by_host = by_host + np.where(is_fused, 0.0, all_inputs[end]) / host
    if is_backward:
        update = between(costs.update_prefix)
        if setting.rules is Rules.OWN:
            share = 1 if setting.is_pp else num_devices
            weights = between(costs.weight_prefix) / share
            sent, update = weights / host + weights * (share - 1) / machine.peer_bytes_per_second, update / share
            leaving = np.zeros(len(start)) if setting.prefetch else sent
        else:
            around = 0.0 if setting.is_pp else 2 * (num_devices - 1) / num_devices
            leaving = sent = state * around / machine.peer_bytes_per_second + state / host
    coming = state / host
    if setting.rules is Rules.HARMONY and not setting.is_pp and len(sizes) == 1:
        # The only input goes to the host after the former turn and comes back before the weights.
        fetched = ~is_fused if is_backward else start > 0
        coming = coming + np.where(fetched, 2 * (inputs[end] if is_backward else inputs[start]) / host, 0.0)
    columns = {
        "coming": coming,
        "entering": entering,
        "first": copying + early + late,
        "late": late,
        "last": last_entering + last_late,
        "total": (copying + early + late) * (len(sizes) - 1) + last_copying + last_early + last_late,
        "leaving": leaving + release,
        "inputs": by_host,
    }
    if is_backward:
        columns.update(sent=sent, update=update)
    return columns


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """Where steps stand, [schedule, ...]. No bound gets smaller when any of these gets larger."""

    free: Floats
    """[schedule, device]: end of its last computation; -inf if there was none. Devices are counted from the next turn's."""
    leaving: Floats
    """[schedule, device]: from then on to when it may go on."""
    before: Floats
    """[schedule, device]: end of the turn before the last one: its slot is free."""
    copied: Floats
    """[schedule, device]: when the lane on which weights come has brought what was needed so far."""
    first: Floats
    """[schedule]: first microbatch of the former turn is done; -inf before the first turn."""
    last: Floats
    """[schedule]: last microbatch of the former turn is done."""
    updated: Floats
    """[schedule, device]: all updates so far are done."""

    def rows(self, rows: Ints) -> "State":
        return State(**{name: getattr(self, name)[rows] for name in State.__slots__})

    def least_of(self, groups: Ints) -> "State":
        """The least of each group's states; group g begins at row `groups[g]`. A bound from it holds for all of them."""
        return State(**{name: np.minimum.reduceat(getattr(self, name), groups, axis=0) for name in State.__slots__})


def before_forward(setting: Setting, count: int) -> State:
    by_device = (count, setting.stride)
    return State(
        free=np.full(by_device, -np.inf),
        leaving=np.zeros(by_device),
        before=np.full(by_device, -np.inf),
        copied=np.zeros(by_device),
        first=np.full(count, -np.inf),
        last=np.full(count, -np.inf),
        updated=np.zeros(by_device),
    )


def after_forward(setting: Setting, turns: Turns) -> State:
    """Where steps stand after all forward turns of each packing."""
    count, stride = len(turns.counts), setting.stride
    state = before_forward(setting, count)
    _take_all(setting, state, turns, np.arange(count))
    # Count devices from the one whose turn is next.
    order = (np.arange(stride)[None, :] + turns.counts[:, None]) % stride
    for name in ("free", "leaving", "before", "copied", "updated"):
        getattr(state, name)[:] = np.take_along_axis(getattr(state, name), order, axis=1)
    return state


def after_backward(setting: Setting, state: State, turns: Turns, packings: Ints) -> Floats:
    """Lower bounds, in seconds, on steps that go on from `state` with one backward packing each."""
    _take_all(setting, state, turns, packings)
    return np.asarray(_ROUNDING * state.updated.max(axis=1))


def _take_all(setting: Setting, state: State, turns: Turns, packings: Ints) -> None:
    """Carry out the turns of `packings`; changes `state`."""
    counts = turns.counts[packings]
    for turn in range(int(counts.max(initial=0))):
        rows = np.nonzero(counts > turn)[0]
        _take(setting, state, turns, turn, rows, turn % setting.stride, packings[rows])


def _take(setting: Setting, state: State, turns: Turns, turn: int, rows: Ints, device: int, packings: Ints) -> None:
    coming, total = turns.coming[packings, turn], turns.total[packings, turn]
    free, leaving = state.free[rows, device], state.leaving[rows, device]
    if setting.rules is Rules.OWN:
        slot = state.before[rows, device] if setting.prefetch else free
        copied = np.maximum(state.copied[rows, device], slot) + coming
        ready = np.maximum(free, copied)
        copied = copied + turns.inputs[packings, turn]
        state.copied[rows, device] = copied
        state.before[rows, device] = free
    elif setting.rules is Rules.HARMONY:
        ready = np.maximum(coming, free + np.maximum(coming, leaving))
    else:
        ready = np.maximum(coming, free + leaving + coming)
    entering, first = turns.entering[packings, turn], turns.first[packings, turn]
    late = turns.late[packings, turn]
    first_done = np.maximum(ready + first, state.first[rows] + entering + late)
    if setting.rules is Rules.OWN:
        first_done = np.maximum(first_done, free + leaving + late)  # by then there is a slot for gradients
    end = np.maximum(first_done - first, ready) + total
    end = np.maximum(end, state.last[rows] + turns.last[packings, turn])
    if setting.rules is Rules.OWN:
        end = np.maximum(end, copied)
    state.free[rows, device] = end
    state.leaving[rows, device] = turns.leaving[packings, turn]
    state.first[rows], state.last[rows] = first_done, end
    sent, update = end + turns.sent[packings, turn], turns.update[packings, turn]
    state.updated[rows, device] = np.maximum(state.updated[rows, device], sent) + update
