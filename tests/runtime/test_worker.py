import gc
import threading
import weakref

import pytest

from harmony_lightning import EmulatedCluster
from harmony_lightning.runtime.worker import HostWorker


@pytest.fixture
def worker():
    worker = HostWorker(EmulatedCluster())
    yield worker
    worker.close()


def fail(text="broken"):
    raise ValueError(text)


def test_jobs_run_in_the_order_of_submission_on_one_other_thread(worker):
    done = []
    for k in range(100):
        worker.submit(lambda k=k: done.append((k, threading.current_thread().name)))
    worker.drain()
    assert done == [(k, "harmony-host-worker") for k in range(100)]


def test_nothing_runs_before_the_first_job(worker):
    before = threading.active_count()
    worker.drain()
    HostWorker(EmulatedCluster()).close()
    assert threading.active_count() == before


def test_an_error_is_raised_by_drain_and_the_jobs_behind_it_are_dropped(worker):
    done = []
    for job in (lambda: done.append(1), fail, lambda: done.append(2), lambda: fail("later")):
        worker.submit(job)
    with pytest.raises(ValueError, match="broken"):
        worker.drain()
    assert done == [1]


def test_after_an_error_was_told_jobs_run_again(worker):
    done = []
    worker.submit(fail)
    with pytest.raises(ValueError, match="broken"):
        worker.drain()
    worker.drain()
    worker.submit(lambda: done.append(1))
    worker.drain()
    assert done == [1]


def test_even_a_keyboard_interrupt_does_not_end_the_thread(worker):
    def interrupt():
        raise KeyboardInterrupt

    worker.submit(interrupt)
    with pytest.raises(KeyboardInterrupt):
        worker.drain()
    worker.submit(int)
    worker.drain()


def test_drain_waits_for_the_running_job(worker):
    gate, done = threading.Event(), []
    worker.submit(lambda: (gate.wait(5), done.append(1)))
    opener = threading.Timer(0.01, gate.set)
    opener.start()
    worker.drain()
    assert done == [1]
    opener.join()


def test_close_finishes_jobs_ends_the_thread_and_drops_errors(worker):
    done = []
    worker.submit(lambda: done.append(1))
    worker.submit(fail)
    thread = worker._thread
    worker.close()
    assert done == [1]
    assert not thread.is_alive()
    worker.close()
    worker.drain()


def test_a_closed_worker_starts_again(worker):
    done = []
    worker.submit(int)
    worker.close()
    worker.submit(lambda: done.append(1))
    worker.drain()
    assert done == [1]


def test_a_job_does_not_outlive_its_turn(worker):
    class Gradient:
        pass

    gradient = Gradient()
    alive = weakref.ref(gradient)
    worker.submit(lambda gradient=gradient: None)
    del gradient
    worker.drain()
    gc.collect()
    assert alive() is None


def test_a_job_that_comes_behind_another_worker_s_does_not_keep_the_thread_waiting(worker):
    cluster = EmulatedCluster()
    other = HostWorker(cluster, "other")
    may_end, done = threading.Event(), []
    first = worker.submit(lambda: (may_end.wait(), done.append("first")))
    behind = other.submit(lambda: done.append("behind"), priority=-1, after=first)
    other.submit(lambda: done.append("beside")).wait()
    may_end.set()
    behind.wait()
    assert done == ["beside", "first", "behind"]
    other.submit(lambda: done.append("later"), after=first).wait()
    assert done[-1] == "later"
    other.close()


def test_what_comes_behind_a_dropped_job_runs_all_the_same(worker):
    other, done = HostWorker(EmulatedCluster(), "other"), []
    worker.submit(fail)
    other.submit(lambda: done.append(1), after=worker.submit(lambda: done.append(0)))
    with pytest.raises(ValueError, match="broken"):
        worker.drain()
    other.drain()
    assert done == [1]
    other.close()
