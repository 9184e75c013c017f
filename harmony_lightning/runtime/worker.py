"""The host worker: one thread beside the controller that receives gradients and updates weights.

Jobs run in the order of submission, so results do not depend on timing. A job's exception is raised on the controller
at the next `drain`, and the jobs behind it are dropped.
"""

import queue
import threading
from collections.abc import Callable

from harmony_lightning.hardware.device import Cluster, Mark

Job = Callable[[], None]


class HostWorker:
    """Starts its thread with the first job; `close` ends it.

    Where the host is the only device there is nothing to overlap with, and each job runs when it is submitted.
    """

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._is_inline = cluster.host_is_device
        self._jobs: queue.Queue[tuple[Job, Mark, threading.Event] | None] = queue.Queue()
        self._done: Mark | None = None
        """Behind the last job."""
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def submit(self, job: Job) -> threading.Event:
        """Returns what is set when the job is done, or dropped."""
        has_ended = threading.Event()
        if self._is_inline:
            job()
            has_ended.set()
            return has_ended
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="harmony-host-worker", daemon=True)
            self._thread.start()
        self._jobs.put((job, self._cluster.mark(), has_ended))
        return has_ended

    def drain(self) -> None:
        """Return when all submitted jobs are done; raise what one of them raised."""
        self._jobs.join()
        if self._done is not None:
            self._done.synchronize()
        self.raise_error()

    def raise_error(self) -> None:
        """Raise what a job has raised, once."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def close(self) -> None:
        """Finish the jobs and end the thread; errors of jobs are dropped."""
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join()
            self._thread = None
        self._error = None

    def _run(self) -> None:
        while (entry := self._jobs.get()) is not None:
            job, submitted, has_ended = entry
            try:
                if self._error is None:
                    submitted.synchronize()
                    with self._cluster.activate(continues=True):
                        job()
            except BaseException as error:
                self._error = error
            finally:
                # The job holds gradients alive; it must not outlive its turn.
                del entry, job
                self._done = self._cluster.mark()
                has_ended.set()
                self._jobs.task_done()
        self._jobs.task_done()
