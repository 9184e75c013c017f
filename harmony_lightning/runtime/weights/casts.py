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
from harmony_lightning.runtime.weights.arena import lay_out, layout_nbytes, narrow_types
from harmony_lightning.runtime.worker import HostWorker, Ticket


class Casts:
    """Of all packs. What is out of date is known on the controller, so that equal runs cast at equal times."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], plan: Plan, cluster: Cluster) -> None:
        self._parameters = parameters
        self._jobs: dict[int, Ticket] = {}
        """By pack: the last job that casts it."""
        self._out_of_date: set[int] = set()
        self._followed: set[int] = set()
        """Packs that are cast behind their update in the running step, or the last one."""
        self._is_wasted = False
        """Whether that was for nothing the last time: somebody might have written masters since."""
        self.worker = HostWorker(cluster, "cast")
        self.arenas: list[torch.Tensor] = []
        """By pack, uint8; empty for one without narrow weights."""
        self._views: list[dict[str, torch.Tensor]] = []
        for pack in plan.packs:
            layout = lay_out(parameters, pack.narrow, narrow_types(plan, pack.narrow))
            self.arenas.append(cluster.host_buffer(layout_nbytes(layout)))
            self._views.append({name: region.view(self.arenas[-1]) for name, region in layout.items()})
        self._trained = [
            frozenset(name for name in pack.narrow if parameters[name].requires_grad) for pack in plan.packs
        ]
        self.forget()

    def forget(self, names: Collection[str] | None = None) -> None:
        """Masters may have been written: these, or any."""
        self._out_of_date |= self._packs_with(names)
        if names is None:
            self._is_wasted |= bool(self._followed)
            self._followed.clear()

    def forget_updated(self, names: Collection[str]) -> None:
        """A step begins behind one in which updates have written these, and since then nobody else has."""
        self._out_of_date |= self._packs_with(names) - self._followed
        self._followed.clear()
        self._is_wasted = False

    def _packs_with(self, names: Collection[str] | None) -> set[int]:
        return {
            pack
            for pack, views in enumerate(self._views)
            if views and (names is None or not views.keys().isdisjoint(names))
        }

    def follow(self, names: Collection[str], update: Ticket, priority: int) -> None:
        """Called on the controller when it has submitted the update of these weights: cast packs of which it writes all
        that train. Their swap-ins until now are over before the update begins."""
        if self._is_wasted:
            return
        for pack, trained in enumerate(self._trained):
            if trained and trained.issubset(names):
                cast = functools.partial(self._cast, pack, tuple(self._views[pack]))
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
        loader: HostWorker,
        await_updates: Callable[[Iterable[str]], None],
    ) -> Ticket | None:
        """Called on the controller in front of a swap-in: have `loader` cast the pack if it is out of date. No swap-in
        reads the arena then: whoever might have written masters has waited for those.

        Args:
            await_updates: returns when weights are not being updated.

        Returns:
            The job behind which the arena is up to date; None if nothing of the pack is cast.
        """
        if pack in self._out_of_date:
            self._out_of_date.discard(pack)
            names = tuple(self._views[pack])
            before = self._jobs.get(pack)

            def cast() -> None:
                await_updates(names)
                if before is not None:
                    before.wait()
                self._cast(pack, names)

            self._jobs[pack] = loader.submit(cast)
        return self._jobs.get(pack)

    @torch.no_grad()
    def _cast(self, pack: int, names: Iterable[str]) -> None:
        for name in names:
            self._views[pack][name].copy_(self._parameters[name])
