"""Task graphs and timelines as data."""

import pytest

from harmony_lightning import ConfigurationError
from harmony_lightning.plan import Kind, Lane, Task, TaskGraph, TaskTimes


def task(seconds, *after, lanes=(Lane.COMPUTE,), kind=Kind.FORWARD):
    lanes = tuple(int(lane) for lane in lanes)
    return Task(kind=int(kind), lanes=lanes, turn=0, microbatch=0, seconds=seconds, nbytes=0, after=after)


GRAPH = TaskGraph(
    num_devices=1,
    tasks=(task(2.0, lanes=(Lane.SWAP_IN,)), task(1.0), task(4.0, 0), task(1.0, 0, lanes=(Lane.SWAP_OUT,))),
)
TIMES = TaskTimes(graph=GRAPH, starts=(0.0, 0.0, 2.0, 2.0), ends=(2.0, 1.0, 6.0, 3.0))


def test_json_is_the_inverse():
    assert TaskTimes.from_json(TIMES.to_json()) == TIMES


def test_a_timeline_tells_its_length_its_load_and_what_binds():
    assert TIMES.seconds == 6.0
    assert TIMES.busy_seconds(Lane.COMPUTE) == 5.0
    assert list(TIMES.critical_path()) == [2, 0]
    assert list(TaskTimes(graph=TaskGraph(num_devices=1, tasks=()), starts=(), ends=()).critical_path()) == []


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ((task(1.0, 0),), "task 0 waits for .*0.*, which must come before it: a deadlock"),
        ((task(1.0), task(1.0, 2)), "task 1 waits for .*2.*a deadlock"),
        ((task(1.0, lanes=(11,)),), "task 0 is on lanes .*11.*; there are 11"),
        ((task(1.0, lanes=()),), "task 0 is on lanes"),
        ((task(-1.0),), "task 0 takes -1.0 seconds"),
    ],
)
def test_graphs_that_cannot_run_cannot_be_made(tasks, message):
    with pytest.raises(ConfigurationError, match=message):
        TaskGraph(num_devices=1, tasks=tasks)
