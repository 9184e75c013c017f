"""Profiles of a run look as on one device, to people and to the scripts that read them.

The microbatches of one step share the actions of Lightning's profilers.

`with self.trainer.profiler.profile("forward"):` in a `training_step` names one action for all microbatches, and they
interleave: a second one enters while the first is parked inside. Lightning's profilers know one span per name, and some
raise. So during the step a span lasts from the first microbatch that enters to the last one that leaves, and may hold
work of others; the sum over all microbatches is what it is about.

Nothing of Lightning is imported, so both of its packages are served.
"""

import functools
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

_OURS, _ONE_DEVICES = "[Strategy]HarmonyStrategy.", "[Strategy]SingleDeviceStrategy."


def name_as_on_one_device(profiler: Any) -> None:
    """Lightning names actions after the strategy's class: from now on after the one-device strategy, as ours is one."""
    if "profile" not in vars(profiler):
        profiler.profile = functools.partial(_profile, profiler)  # which can be pickled, as a Trainer is during a run


def name_as_usual(profiler: Any) -> None:
    """May be called twice."""
    if getattr(vars(profiler).get("profile"), "func", None) is _profile:
        del profiler.profile


def _profile(profiler: Any, action_name: str) -> AbstractContextManager[None]:
    if action_name.startswith(_OURS):
        action_name = _ONE_DEVICES + action_name.removeprefix(_OURS)
    return type(profiler).profile(profiler, action_name)  # type: ignore[no-any-return]


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
