import random

import numpy
import pytest
import torch

from harmony_lightning.hardware.host import HostDevice
from harmony_lightning.runtime.randomness import (
    HostState,
    Replay,
    Stream,
    _Numpy,
    _Python,
    draw_step_seed,
    microbatch_seed,
)

DEVICE = HostDevice()


class OwnGenerator(HostDevice):
    """A device with a generator of its own, as a GPU has."""

    def __init__(self):
        super().__init__()
        self.generator = torch.Generator().manual_seed(1)

    def random_state(self):
        return self.generator.get_state()

    def set_random_state(self, state):
        self.generator.set_state(state)

    def seed_random(self, seed):
        self.generator.manual_seed(seed)

    def draw(self):
        return torch.rand((), generator=self.generator).item()


@pytest.fixture(autouse=True)
def _seeded():
    before = HostState.capture()
    torch.manual_seed(0)
    random.seed(0)
    numpy.random.seed(0)
    yield
    before.restore()


DRAWS = {
    "torch": lambda: torch.rand(()).item(),
    "python": random.random,
    "python gauss": lambda: random.gauss(0, 1),
    "numpy": numpy.random.rand,
    "numpy normals": lambda: tuple(numpy.random.randn(2)),
}


def draw_all():
    return [draw() for draw in DRAWS.values()]


def test_microbatches_have_different_seeds_that_depend_on_step_and_index_alone():
    seeds = [microbatch_seed(step, m) for step in range(50) for m in range(50)]
    assert len(set(seeds)) == 2500
    assert all(0 <= seed < 1 << 63 for seed in seeds)
    assert microbatch_seed(-5, 0) != microbatch_seed(5, 0)
    # The published splitmix64: the first output from state 0, less its lowest bit.
    assert microbatch_seed(0, 0) == 0xE220A8397B1DCDAF >> 1


def test_a_step_draws_once_from_the_global_generator():
    first, second = draw_step_seed(), draw_step_seed()
    assert first != second
    after = torch.rand(())
    torch.manual_seed(0)
    torch.empty((), dtype=torch.int64).random_()
    torch.empty((), dtype=torch.int64).random_()
    assert torch.equal(torch.rand(()), after)


def test_streams_do_not_disturb_each_other():
    def alone(seed):
        stream = Stream(seed)
        stream.resume()
        return draw_all() + draw_all()

    expected = [alone(seed) for seed in (3, 4)]
    streams, drawn = [Stream(3), Stream(4)], [[], []]
    for index in (0, 1, 1, 0):
        streams[index].resume()
        drawn[index] += draw_all()
        streams[index].suspend()
    assert drawn == expected
    assert expected[0] != expected[1]


def test_a_stream_without_seed_goes_on_with_the_process_s_numbers():
    expected = draw_all() + draw_all()
    torch.manual_seed(0)
    random.seed(0)
    numpy.random.seed(0)
    stream = Stream(None)
    stream.resume()
    drawn = draw_all()
    stream.suspend()
    draw_all()
    stream.resume()
    assert drawn + draw_all() == expected


@pytest.mark.parametrize("between", [lambda: None, numpy.random.rand, numpy.random.randn, lambda: numpy.random.seed(5)])
@pytest.mark.parametrize("before", [lambda: None, numpy.random.rand, numpy.random.randn])
def test_numpy_s_generator_comes_back_whatever_was_drawn(before, between):
    """Whether its memory is written or all of its state is set; with the normal number that it keeps."""
    numpy.random.seed(3)
    before()
    expected = [numpy.random.randn(3), numpy.random.rand(2)]
    numpy.random.seed(3)
    before()
    generator = _Numpy()
    state = generator.state()
    generator.expect()
    numpy.random.seed(4)
    generator.expect()
    for _ in range(2):
        between()
        generator.restore(state)
        assert numpy.array_equal(numpy.random.randn(3), expected[0])
        assert numpy.array_equal(numpy.random.rand(2), expected[1])


def test_where_nobody_draws_numpy_s_generator_is_only_copied(monkeypatch):
    numpy.random.seed(3)
    generator = _Numpy()
    generator.expect()
    first = generator.state()
    numpy.random.seed(4)
    generator.expect()
    monkeypatch.setattr(numpy.random, "set_state", None)
    monkeypatch.setattr(numpy.random, "get_state", None)
    for _ in range(3):
        second = generator.state()
        generator.restore(first)
        assert generator.state() == first != second
        generator.restore(second)


@pytest.mark.parametrize("is_known", [True, False])
def test_python_s_generator_comes_back_with_the_normal_number_that_it_keeps(is_known):
    """Whether its memory is what it is taken for, as it is here, or not."""
    generator = _Python()
    assert generator._is_known
    generator._is_known = is_known
    random.gauss(0, 1)
    state = generator.state()
    assert generator.state() == state
    expected = [random.gauss(0, 1), random.random()]
    assert generator.state() != state
    random.seed(5)
    generator.restore(state)
    assert [random.gauss(0, 1), random.random()] == expected


def test_the_device_s_part_of_a_stream_follows_it_to_other_devices():
    one, two = OwnGenerator(), OwnGenerator()
    one.seed_random(9)
    expected = [one.draw() for _ in range(4)]
    stream, drawn = Stream(9), []
    for device in (one, two, two, one):
        stream.enter_device(device)
        drawn.append(device.draw())
        stream.leave_device(device)
        device.draw()
    assert drawn == expected


@pytest.mark.parametrize("name", DRAWS)
def test_a_replay_repeats_what_was_drawn_and_then_is_undone(name):
    draw = DRAWS[name]
    replay = Replay(DEVICE)
    first = draw()
    replay.keep_what_was_drawn(DEVICE)
    expected = HostState.capture()
    now = [draw(), draw()]
    expected.restore()
    present = replay.begin(DEVICE)
    assert draw() == first
    present.begin(DEVICE)
    assert [draw(), draw()] == now


def test_a_replay_repeats_the_second_of_a_pair_of_normals():
    numpy.random.randn()
    replay = Replay(DEVICE)
    first = numpy.random.randn()
    replay.keep_what_was_drawn(DEVICE)
    replay.begin(DEVICE)
    assert numpy.random.randn() == first


@pytest.mark.parametrize(
    ("name", "kept"),
    [("torch", {"_torch"}), ("python", {"_python"}), ("numpy", {"_numpy"}), (None, set())],
)
def test_only_generators_that_were_drawn_from_are_kept_and_set(name, kept):
    replay = Replay(DEVICE)
    if name is not None:
        DRAWS[name]()
    replay.keep_what_was_drawn(DEVICE)
    assert {slot for slot in Replay.__slots__ if getattr(replay, slot) is not None} == kept
    untouched = [other for other in ("torch", "python", "numpy") if other != name]
    state = HostState.capture()
    expected = [DRAWS[other]() for other in untouched]
    state.restore()
    replay.begin(DEVICE)
    assert [DRAWS[other]() for other in untouched] == expected


def test_a_replay_covers_the_device_s_own_generator():
    device = OwnGenerator()
    replay = Replay(device)
    first = device.draw()
    replay.keep_what_was_drawn(device)
    assert replay._device_state is not None
    present = replay.begin(device)
    assert device.draw() == first
    present.begin(device)
    assert device.draw() != first
    untouched = Replay(device)
    untouched.keep_what_was_drawn(device)
    assert untouched._device_state is None


def test_a_replay_can_be_repeated():
    replay = Replay(DEVICE)
    first = draw_all()
    replay.keep_what_was_drawn(DEVICE)
    for _ in range(2):
        present = replay.begin(DEVICE)
        assert draw_all() == first
        present.begin(DEVICE)
