"""The host worker: one thread beside the controller that receives gradients and updates weights.

Jobs run in the order of submission, so results do not depend on timing. A job's exception is raised on the controller
at the next `drain`, and the jobs behind it are dropped.
"""

import queue
import threading
from collections.abc import Callable

Job = Callable[[], None]


class HostWorker:
    """Starts its thread with the first job; `close` ends it.

    Where the host is the only device there is nothing to overlap with: `is_inline` runs each job when it is submitted.
    """

    def __init__(self, *, is_inline: bool = False) -> None:
        self._is_inline = is_inline
        self._jobs: queue.Queue[Job | None] = queue.Queue()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def submit(self, job: Job) -> None:
        if self._is_inline:
            job()
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="harmony-host-worker", daemon=True)
            self._thread.start()
        self._jobs.put(job)

    def drain(self) -> None:
        """Return when all submitted jobs are done; raise what one of them raised."""
        self._jobs.join()
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
        while (job := self._jobs.get()) is not None:
            try:
                if self._error is None:
                    job()
            except BaseException as error:
                self._error = error
            finally:
                # The job holds gradients alive; it must not outlive its turn.
                del job
                self._jobs.task_done()
        self._jobs.task_done()
