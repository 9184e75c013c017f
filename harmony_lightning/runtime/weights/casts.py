"""Narrow weights on the host: what is cast of the masters, and when.

A pack's narrow weights lie in one arena, from which they travel. They are cast again behind their update, by a thread of
its own, so that the next forward, in which all packs come in at once, finds most of them; or else at the first swap-in
since masters may have changed, by the thread that enqueues the swap-in. The worker that updates goes on meanwhile.

Updates change those that they step. Whether anybody else has written nobody can tell in general (`weight.data`, numpy): so
all may have changed whenever weights are at rest between two steps, and within a step when user code writes a master.
"""

import functools
from collections.abc import Callable, Collection, Iterable, Mapping

import torch
from torch import nn

from harmony_lightning.hardware.device import Cluster
from harmony_lightning.plan import Plan
from harmony_lightning.runtime.weights.arena import lay_out, layout_nbytes, narrow_types, trained_first
from harmony_lightning.runtime.worker import HostWorker, Ticket


class Casts:
    """Of all packs. What is out of date is known on the controller, so that equal runs cast at equal times."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], plan: Plan, cluster: Cluster) -> None:
        self._parameters = parameters
        self._jobs: dict[int, Ticket] = {}
        """By pack: the last job that casts it."""
        self._out_of_date: list[set[str]] = [set() for _ in plan.packs]
        """By pack, names."""
        self._followed: set[int] = set()
        """Packs that are cast behind their update in the running step, or the last one."""
        self._is_wasted = False
        """Whether that was for nothing the last time: somebody might have written masters since."""
        self.worker = HostWorker(cluster, "cast")
        self.arenas: list[torch.Tensor] = []
        """By pack, uint8; empty for one without narrow weights."""
        self._views: list[dict[str, torch.Tensor]] = []
        for pack in plan.packs:
            layout = lay_out(parameters, trained_first(parameters, pack.narrow), narrow_types(plan, pack.narrow))
            self.arenas.append(cluster.host_buffer(layout_nbytes(layout)))
            self._views.append({name: region.view(self.arenas[-1]) for name, region in layout.items()})
        self._trained = [
            frozenset(name for name in pack.narrow if parameters[name].requires_grad) for pack in plan.packs
        ]
        self.forget()

    def forget(self, names: Collection[str] | None = None) -> None:
        """Masters may have been written: these, or any."""
        for views, out_of_date in zip(self._views, self._out_of_date, strict=True):
            out_of_date.update(views if names is None else views.keys() & names)
        if names is None:
            self._is_wasted |= bool(self._followed)
            self._followed.clear()

    def forget_updated(self, names: Collection[str]) -> None:
        """A step begins behind one in which updates have written these, and since then nobody else has."""
        for pack in self._packs_with(names) - self._followed:
            self._out_of_date[pack].update(self._views[pack].keys() & names)
        self._followed.clear()
        self._is_wasted = False

    def _packs_with(self, names: Collection[str]) -> set[int]:
        return {pack for pack, views in enumerate(self._views) if not views.keys().isdisjoint(names)}

    def follow(self, names: Collection[str], update: Ticket, priority: int) -> None:
        """Called on the controller when it has submitted the update of these weights: cast what trains of packs of which
        it writes all that does. Their swap-ins until now are over before the update begins."""
        if self._is_wasted:
            return
        for pack, trained in enumerate(self._trained):
            if trained and trained.issubset(names):
                cast = functools.partial(self._cast, pack, trained)
                self._jobs[pack] = self.worker.submit(cast, priority, after=update)
                self._followed.add(pack)

    def await_casts(self, names: Iterable[str]) -> None:
        """Return when nobody reads these masters to cast them."""
        for pack in self._packs_with(frozenset(names)):
            if pack in self._jobs:
                self._jobs[pack].wait()

    def prepare(
        self,
        pack: int,
        wanted: Collection[str],
        loader: HostWorker,
        await_updates: Callable[[Iterable[str]], None],
    ) -> Ticket | None:
        """Called on the controller in front of a swap-in of the weights that are `wanted`: have `loader` cast those of them
        that are out of date. No swap-in reads them in the arena then: whoever might have written masters has waited.

        Args:
            await_updates: returns when weights are not being updated.

        Returns:
            The job behind which they are up to date; None if nothing of the pack is cast.
        """
        if names := self._out_of_date[pack].intersection(wanted):
            self._out_of_date[pack] -= names
            before = self._jobs.get(pack)

            def cast() -> None:
                await_updates(names)
                if before is not None:
                    before.wait()
                self._cast(pack, names)

            self._jobs[pack] = loader.submit(cast)
        return self._jobs.get(pack)

    @torch.no_grad()
    def _cast(self, pack: int, names: Collection[str]) -> None:
        for name, view in self._views[pack].items():
            if name in names:
                view.copy_(self._parameters[name])
