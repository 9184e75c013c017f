"""Between steps: updates are still running and newer weights are on devices, until somebody looks.

Whoever is about to look at weights, gradients or states of optimizers makes them come to rest: updates are finished
(`settle`), copies have arrived (`wait`), and what has stayed on devices comes to the host (`bring_home`).
"""

import os
import weakref
from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch

from harmony_lightning.hardware.device import Cluster, Lane
from harmony_lightning.runtime.derived import Derived, derive_on_host
from harmony_lightning.runtime.state import RuntimeState
from harmony_lightning.runtime.structure import tensors_in


class Rest:
    """What one engine has still to bring to rest.

    Attributes:
        has_settled: weights, gradients and states of optimizers are those of the end of the step.
        is_updated: whether updates may write a tensor.
    """

    def __init__(self, cluster: Cluster) -> None:
        self.has_settled = True
        self.is_updated: Callable[[torch.Tensor], bool] = lambda tensor: False
        self._cluster = cluster
        self._state: RuntimeState | None = None
        self._derived: list[Derived] = []
        _all.add(self)

    def load(self, state: RuntimeState | None, derived: Iterable[Derived] = ()) -> None:
        """What it is about from now on; None if nothing is loaded."""
        self._state, self._derived = state, list(derived)

    @property
    def updated(self) -> Collection[str]:
        """Names of weights whose gradients the last backward has made complete."""
        return () if self._state is None else self._state.gradients.completed

    def finish_updates(self) -> None:
        """Return when all updates are done; an error in one of them is raised here."""
        self.has_settled = True
        if self._state is not None:
            self._state.settle()

    def wait(self) -> None:
        """Wait for all copies: from here on anybody may write the masters, and slots may go. Not for those of updates that
        go on: whoever looks at what they write settles first."""
        if self._state is not None:
            self._state.weights.finish_enqueuing()
        for device in self._cluster.devices:
            for lane in (Lane.SWAP_IN, Lane.STASH_IN, Lane.SWAP_OUT, Lane.SUM_OUT, Lane.UPDATE_OUT):
                if lane is not Lane.UPDATE_OUT or self.has_settled:
                    device.record(lane).synchronize()

    def wait_between_steps(self) -> None:
        """The same when no step is running."""
        self.wait()
        with self._cluster.activate():
            pass  # an emulated one looks whether that is so

    def bring_home(self) -> None:
        """Bring what has stayed on devices, and is newer there, to the host: anybody may look at it, and write it."""
        if self._state is not None and self._state.weights.is_behind:
            with self._cluster.activate(continues=True), torch._C.DisableTorchFunction():
                self._state.weights.bring_home()

    def derive(self) -> None:
        """Renew what hooks have made of weights."""
        if self._derived:
            self.bring_home()
            derive_on_host(self._derived)

    def is_asked_for(self, arguments: Any) -> bool:
        """Whether user code is about to work with what is not at rest."""
        if self.has_settled and (self._state is None or not self._state.weights.is_behind):
            return False
        return any(self.is_updated(tensor) for tensor in tensors_in(arguments))


_all: weakref.WeakSet[Rest] = weakref.WeakSet()


def _before_fork() -> None:
    for rest in list(_all):
        if not rest.has_settled and rest._state is not None:
            rest._state.wait()  # an error would be lost here; it is raised where the engine settles
        rest.bring_home()


def _in_child() -> None:
    for rest in list(_all):
        rest.has_settled = True


# Workers of data loaders are forked between epochs: they must find finished weights, and no thread amid its work. Nor must
# they wait for one: threads stay behind, and a lock that one of them held at the fork is held for good.
os.register_at_fork(before=_before_fork, after_in_child=_in_child)
