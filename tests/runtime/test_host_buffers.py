"""Host memory in which gradients arrive: as much as the plan says, whatever runs ahead."""

import threading

import pytest
import torch

from harmony_lightning import EmulatedCluster
from harmony_lightning.runtime.updates.host_buffers import HostBuffers
from harmony_lightning.runtime.weights.arena import lay_out
from harmony_lightning.runtime.worker import HostWorker

LAYOUT = lay_out({"weight": torch.nn.Parameter(torch.zeros(16))}, ["weight"])
NBYTES = 64


@pytest.fixture
def cluster():
    return EmulatedCluster()


@pytest.fixture
def worker(cluster):
    worker = HostWorker(cluster)
    yield worker
    worker.close()


def arrive(buffers, worker, job=lambda lent: lent.clear(), priority=0, **kind):
    """A gradient arrives, and a job deals with it; returns the buffer's address."""
    buffer = buffers.take(NBYTES, **kind)
    lent = buffers.lend(buffer, LAYOUT, ["weight"])
    buffers.follow(buffer, worker.submit(lambda: job(lent), priority), **kind)
    return buffer.data_ptr()


def test_buffers_go_round(cluster, worker):
    buffers = HostBuffers(cluster, worker, limits={"next": 2})
    assert len({arrive(buffers, worker) for _ in range(20)}) <= 3


def test_whoever_runs_ahead_waits_for_those_who_deal_with_gradients(cluster, worker):
    buffers, go_on, taken = HostBuffers(cluster, worker, limits={"next": 2}), threading.Event(), []

    def run_ahead():
        for _ in range(3):
            taken.append(arrive(buffers, worker, lambda lent: (go_on.wait(), lent.clear())))

    ahead = threading.Thread(target=run_ahead)
    ahead.start()
    ahead.join(0.2)
    assert ahead.is_alive() and len(taken) == 2
    go_on.set()
    ahead.join()
    assert len(taken) == 3


def test_no_update_waits_for_one_that_comes_later(cluster, worker):
    """The last ones wait until there is nothing else, and do not keep others from taking buffers meanwhile."""
    buffers, order, go_on = HostBuffers(cluster, worker, {"next": 2, "last": 2}), [], threading.Event()
    worker.submit(go_on.wait)
    for priority, urgency in ((2, "last"), (1, "last"), (0, "next"), (0, "next")):
        arrive(buffers, worker, lambda lent, p=priority: (order.append(p), lent.clear()), priority, urgency=urgency)
    go_on.set()
    worker.drain()
    assert order == [0, 0, 1, 2]


def test_a_gradient_that_somebody_keeps_is_not_overwritten(cluster, worker):
    buffers, kept = HostBuffers(cluster, worker, limits={"next": 1}), []
    arrive(buffers, worker, lambda lent: kept.append(lent.pop("weight").fill_(7)))
    for _ in range(5):
        arrive(buffers, worker, lambda lent: (lent["weight"].zero_(), lent.clear()))
    assert torch.equal(kept[0], torch.full((16,), 7.0))


def test_what_was_kept_until_this_backward_is_taken_in_the_next_one(cluster, worker):
    """A job of this backward may free it at any time, which would be seen before devices have come so far."""
    buffers, kept = HostBuffers(cluster, worker, limits={"next": 1}), []
    first = arrive(buffers, worker, lambda lent: kept.append(lent.pop("weight")))
    buffers.begin()
    others = {arrive(buffers, worker, lambda lent: (kept.clear(), lent.clear())) for _ in range(4)}
    buffers.begin()
    assert first not in others
    assert first in {arrive(buffers, worker) for _ in range(4)}


def test_an_error_of_the_job_before_is_raised_where_the_next_one_asks(cluster, worker):
    buffers = HostBuffers(cluster, worker, limits={"next": 1})

    def fail(lent):
        raise ValueError("broken")

    arrive(buffers, worker, fail)
    with pytest.raises(ValueError, match="broken"):
        arrive(buffers, worker)
