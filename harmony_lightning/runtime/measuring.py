"""Which steps are looked at, and what was found: a `Meter` weighs what might stay in a step, a `Holding` sees what does.

The strategy asks in front of a step (`measure`, `watch`); the engine says when that step begins and ends.
"""

from collections.abc import Callable

from harmony_lightning.hardware.device import Cluster
from harmony_lightning.plan import Plan, Usage
from harmony_lightning.runtime.meter import Holding, Meter, VisitPeaks


class Measuring:
    """One engine's.

    Attributes:
        usage: what the measured step has taken; None if there was none, or it was not cut.
        meter: of the running step, if it is measured.
        peaks: the same, and of one that is watched.
        holding: of a step that is watched, until its forward ends: from there on, what waits goes.
    """

    def __init__(self, cluster: Cluster) -> None:
        self.usage: Usage | None = None
        self.meter: Meter | None = None
        self.peaks: VisitPeaks | None = None
        self.holding: Holding | None = None
        self._cluster = cluster
        self._measures: bool | None = None
        """Whether the next step of a kind is measured, and that kind."""
        self._watched: Holding | None = None
        """Of the next training step, or the running one."""

    def measure(self, *, trains: bool) -> None:
        """Find out what the next step takes; `usage` tells it afterwards. `trains`: it is cut, and has a backward."""
        self._measures, self.usage = trains, None

    def watch(self, plan: Plan) -> Holding:
        """Find out what stays in the next training step, which is under this plan and tells it afterwards."""
        self._measures = None
        self.holding = self._watched = Holding(plan, len(self._cluster.devices))
        return self.holding

    def is_due(self, *, trains: bool) -> bool:
        """Whether the step that is about to begin is to be looked at."""
        return self._measures is trains or (trains and self._watched is not None)

    def begin(self, plan: Plan, slot_nbytes: Callable[[], list[int]], *, trains: bool) -> None:
        """The step begins; `slot_nbytes` tells what slots for weights take on each device."""
        self.peaks = VisitPeaks(self._cluster.devices, slot_nbytes)
        if self._watched is not None:
            self._watched.peaks = self.peaks
        if self._measures is trains:
            self._measures = None
            self.meter = Meter(plan, self.peaks, trains=trains)

    def end(self) -> None:
        """The step was carried out to its end."""
        meter, watched = self.meter, self._watched
        self.meter = self.peaks = self._watched = None
        if meter is not None:
            self.usage = meter.usage()
        if watched is not None:
            watched.end()

    def abort(self) -> None:
        """It was given up."""
        self.meter = self.peaks = self.holding = self._watched = None
