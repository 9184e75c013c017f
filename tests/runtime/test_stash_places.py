"""Host memory of stashes: nobody's place is given to another, and there is as much as was in use at once."""

import contextlib
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harmony_lightning import EmulatedCluster, RaceError
from harmony_lightning.hardware.device import Lane
from harmony_lightning.hardware.host import HostCluster
from harmony_lightning.plan import Lifetime, aligned
from harmony_lightning.plan.offsets import most_alive
from harmony_lightning.runtime.counters import Counters
from harmony_lightning.runtime.stash_places import StashPlaces


class Steps:
    """Fills whatever it is given, and looks whether it stays so."""

    def __init__(self):
        self.counters = Counters()
        self.decision = ()
        self.cluster = HostCluster()
        self.places = StashPlaces(self.cluster, self.counters, lambda: self.decision)
        self.alive = []
        self.num_taken = 0

    @property
    def nbytes(self):
        return self.places._arenas[0].memory.numel()

    def leave(self, visit, shape, dtype=torch.float32):
        source = torch.zeros(shape, dtype=dtype)
        host, stay = self.places.take(source, self.cluster.devices[0], visit)
        assert (host.shape, host.stride(), host.dtype) == (source.shape, source.stride(), source.dtype)
        self.num_taken += 1
        self.alive.append((host.fill_(self.num_taken), self.num_taken, stay))

    def end(self, index=-1):
        host, value, stay = self.alive.pop(index)
        assert bool((host == value).all())
        stay.end()

    def step(self, sizes, num_kept=0):
        """All leave, and go the other way round but for the first ones. Returns how many had no place."""
        before = self.counters.unplaced_stashes
        for index, size in enumerate(sizes):
            self.leave((index // 2, 0), size)
        while len(self.alive) > num_kept:
            self.end()
        self.places.end_step()
        return self.counters.unplaced_stashes - before


_ACTIONS = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 1), st.integers(0, 40), st.booleans()), max_size=20)


@settings(deadline=None)
@given(st.lists(_ACTIONS, max_size=3), st.lists(st.integers(0, 2), min_size=4, max_size=8), st.randoms())
def test_what_waits_is_never_written(kinds, order, choices):
    """Steps of some kinds in any order, in which anything ends at any time, perhaps in a later step."""
    steps = Steps()
    for kind in order:
        for pack, microbatch, size, ends in kinds[kind] if kind < len(kinds) else ():
            steps.leave((pack, microbatch), size)
            if ends:
                steps.end(choices.randrange(len(steps.alive)))
        steps.places.end_step()
    while steps.alive:
        steps.end()


def test_the_second_step_has_places_in_as_much_memory_as_is_in_use_at_once():
    steps, sizes = Steps(), [(5, 7), (1,), (1000, 3), (0, 4), (17,)]
    assert [steps.step(sizes) for _ in range(4)] == [len(sizes), 0, 0, 0]
    assert steps.nbytes == sum(aligned(4 * torch.Size(size).numel()) for size in sizes)
    assert [steps.step(sizes[:3]), steps.step([(1,)] * 5)] == [0, 1]  # fewer, or smaller but for one


def test_what_is_there_at_different_times_shares_memory():
    """As that of microbatches that go through all packs one after the other."""
    rng = random.Random(0)
    sizes = [[rng.randrange(1, 1 << 12) for _ in range(6)] for _ in range(4)]
    steps, lifetimes = Steps(), []
    for _ in range(3):
        now = 0
        for microbatch, mine in enumerate(sizes):
            for pack, size in enumerate(mine):
                steps.leave((pack, microbatch), size)
                lifetimes.append(Lifetime(now + pack, now + 12 - pack, aligned(4 * size)))
            while steps.alive:
                steps.end()
            now += 12
        steps.places.end_step()
    assert steps.counters.unplaced_stashes == 24
    assert most_alive(lifetimes[:24]) <= steps.nbytes <= 1.1 * most_alive(lifetimes[:24])


def test_larger_ones_get_larger_places_and_a_few_bytes_do_not():
    steps = Steps()
    for _ in range(2):
        steps.step([(1000,)] * 8)
    nbytes = steps.nbytes
    assert [steps.step([*[(1000,)] * 8, (1100,)]) for _ in range(3)] == [1, 1, 1]
    assert steps.nbytes == nbytes == 8 * aligned(4000)
    assert [steps.step([(2000,)] * 8) for _ in range(2)] == [8, 0]
    assert steps.nbytes == 8 * aligned(8000)
    assert [steps.step([(1000,)] * 8) for _ in range(2)] == [0, 0]
    assert steps.nbytes == 8 * aligned(8000)


def test_what_is_kept_over_steps_keeps_its_place():
    steps = Steps()
    for _ in range(2):
        steps.step([(1000,)] * 8)
    assert steps.step([(1000,)] * 8, num_kept=1) == 0
    assert steps.step([(1000,)] * 8, num_kept=1) == 1  # its place is taken
    assert steps.step([(1000,)] * 8) == 1
    assert steps.step([(1000,)] * 8) == 0
    assert not steps.alive


def test_as_long_as_the_plan_changes_no_places_are_planned():
    steps = Steps()
    for decision in [(), (1,), (1, 2)]:
        steps.decision = decision
        assert steps.step([(100,)] * 4) == 4
    assert steps.nbytes == 0
    assert [steps.step([(100,)] * 4) for _ in range(2)] == [0, 0]


def test_what_goes_amid_backward_has_no_place_and_is_not_expected_again():
    steps = Steps()
    for _ in range(3):
        steps.leave(None, (1000,))
        steps.step([(10,)] * 2)
    assert steps.counters.unplaced_stashes == 3 + 2
    assert steps.nbytes == 128


@pytest.mark.parametrize(
    "source", [torch.zeros(4, 6).t(), torch.zeros(2, 3, 4, 5, dtype=torch.bfloat16).permute(0, 2, 3, 1)]
)
def test_a_place_lies_in_memory_as_the_device_s_tensor_does(source):
    cluster = HostCluster()
    places = StashPlaces(cluster, Counters(), lambda: None)
    for _ in range(3):
        host, stay = places.take(source, cluster.devices[0], (0, 0))
        assert host.stride() == source.stride()
        stay.end()
        places.end_step()
    assert host.untyped_storage().nbytes() == aligned(source.nbytes)


@pytest.mark.parametrize("compute_waits", [True, False])
def test_a_place_that_is_still_being_read_is_not_written(compute_waits):
    """Compute has waited for what came back, and what leaves waits for compute; else the race check tells."""
    cluster = EmulatedCluster(1)
    (device,) = cluster.devices
    places = StashPlaces(cluster, Counters(), lambda: None)

    def step():
        tensor = torch.zeros(100, device=device.torch_device)
        host, stay = places.take(tensor, device, (0, 0))
        device.wait(Lane.SWAP_OUT, device.record(Lane.COMPUTE))
        with device.lane(Lane.SWAP_OUT):
            host.copy_(tensor, non_blocking=True)
        left = device.record(Lane.SWAP_OUT)
        device.wait(Lane.COMPUTE, left)
        back = torch.empty(100, device=device.torch_device)
        for event in (left, device.record(Lane.COMPUTE)):
            device.wait(Lane.STASH_IN, event)
        with device.lane(Lane.STASH_IN):
            back.copy_(host, non_blocking=True)
        if compute_waits:
            device.wait(Lane.COMPUTE, device.record(Lane.STASH_IN))
        stay.end()
        places.end_step()
        return back

    with cluster.activate(continues=True):
        held = [step(), step()]  # the first one has no place
        with contextlib.nullcontext() if compute_waits else pytest.raises(RaceError, match="copy"):
            held.append(step())
