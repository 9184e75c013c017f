"""Lets the microbatches of one step share the actions of Lightning's profilers.

`with self.trainer.profiler.profile("forward"):` in a `training_step` names one action for all microbatches, and they
interleave: a second one enters while the first is parked inside. Lightning's profilers know one span per name, and some
raise. So during the step a span lasts from the first microbatch that enters to the last one that leaves, and may hold
work of others; the sum over all microbatches is what it is about.

Nothing of Lightning is imported, so both of its packages are served.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def merged_profile(profiler: Any) -> Iterator[None]:
    """Within, `profiler.start` and `stop` of one action may overlap. Its own methods are back on every exit."""
    start, stop = profiler.start, profiler.stop
    inside: Counter[str] = Counter()

    def start_first(action_name: str) -> None:
        if not inside[action_name]:
            start(action_name)
        inside[action_name] += 1

    def stop_last(action_name: str) -> None:
        inside[action_name] -= 1
        if inside[action_name] <= 0:
            inside[action_name] = 0
            stop(action_name)  # one that never began is the profiler's to judge

    own = {name: vars(profiler)[name] for name in ("start", "stop") if name in vars(profiler)}
    profiler.start, profiler.stop = start_first, stop_last
    try:
        yield
    finally:
        del profiler.start, profiler.stop
        vars(profiler).update(own)
