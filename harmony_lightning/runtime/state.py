"""What is where: the state that segments and layers share while a step runs.

It sits below everything that runs user code and knows none of it: `segment`, `layer`, `stash` and `microbatch` ask here
for weights, hand gradients in here, and say when a layer's own code is running; the `engine` above loads it and moves it
from visit to visit.
"""

import dataclasses
import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode, _pop_mode

from harmony_lightning.decomposer.discover import weight_names
from harmony_lightning.hardware.device import Cluster, Device, Event, Lane
from harmony_lightning.plan import Plan, travelling_nbytes
from harmony_lightning.runtime.counters import Counters
from harmony_lightning.runtime.device_memory import DeviceMemory
from harmony_lightning.runtime.measuring import Measuring
from harmony_lightning.runtime.swapped_weights import SwappedWeights
from harmony_lightning.runtime.thread_state import Autocast, ThreadState
from harmony_lightning.runtime.transfer import Arrival, Departures, Landings, send
from harmony_lightning.runtime.updates.gradients import GradientStore
from harmony_lightning.runtime.weights.buffers import BufferStore
from harmony_lightning.runtime.weights.glue_weights import GlueWeights
from harmony_lightning.runtime.weights.narrow import Watch, WeightUses
from harmony_lightning.runtime.worker import HostWorker

log = logging.getLogger(__name__)

Result = TypeVar("Result")


class RuntimeState:
    """Weights, gradients and buffers of one root module under one plan.

    Attributes:
        depth: how many layers the running code is inside of; 0 in glue.
        spare_nbytes: what copies, sums and the like that the plan knows nothing of may take on a device, each kind, before
            they give way to the next: code between layers may go through all weights.
        travelling_nbytes: what tensors may take on a device that are on their way to or from others.
        memory: of the devices, where it is short.
        weights: those of layers, on all devices.
        glue: device copies of weights that user code uses outside of layers.
        is_recomputing: a layer is being run again for its backward.
        is_differentiating: a segment's backward runs.
        outside: autocast as it is around the step, where on one device backward runs; None if it is no other within.
        is_holding: gradients that a backward leaves behind wait for the minibatch's others.
        slot_nbytes: of the largest pack's weights.
        objects: what the running layer has been given within objects.
        narrow: names of narrow weights by pack.
        uses: what has been seen of how layers use their weights; `is_learning` in the first step.
        measuring: what the running step takes, and what stays in it, if anybody wants to know.
        watching: sees the weights of the running layer; None if they need not be looked at.
        watcher: the function mode that user code runs under.
        thread: what torch keeps of the thread while the engine's own code runs, between microbatches.
        anchor: a leaf that requires a gradient: makes nodes part of the graph whatever their other inputs are.
    """

    def __init__(
        self,
        root: nn.Module,
        cluster: Cluster,
        plan: Plan,
        counters: Counters,
        worker: HostWorker,
        uses: WeightUses,
        measuring: Measuring,
    ) -> None:
        self.cluster = cluster
        self.plan = plan
        self.counters = counters
        self.parameters = dict(root.named_parameters())
        self.names = weight_names(root)
        self._kinds = tuple((p.requires_grad, p.dtype, p.shape) for p in self.parameters.values())
        self.slot_nbytes = max(pack.slot_nbytes for pack in plan.packs)
        self.buffers = BufferStore(counters, limit_nbytes=self.slot_nbytes)
        memory_bytes = min(device.memory_bytes for device in cluster.devices)
        self.spare_nbytes = memory_bytes // 16
        self.travelling_nbytes = travelling_nbytes(memory_bytes, plan.prefetch)
        self.weights = SwappedWeights(
            self.parameters,
            plan,
            cluster,
            counters,
            lambda reads: GradientStore(
                self.parameters,
                plan,
                cluster,
                counters,
                worker,
                reads=reads,
                with_room=lambda device, function: self.memory.with_room(device, function),
                limit_nbytes=self.spare_nbytes,
            ),
        )
        self.refer = [functools.partial(self.weights.refer, device) for device in cluster.devices]
        """By device: what finds a tensor in its slot memory again; None for others."""
        self.gradients = self.weights.gradients
        self.depth = 0
        self.is_recomputing = False
        self.is_differentiating = False
        self.outside: Autocast | None = None
        self.is_holding = False
        self.objects: Any = None
        self.uses = uses
        self.is_learning = False
        self.measuring = measuring
        self.watching: Watch | None = None
        self.watcher: TorchFunctionMode | None = None
        self.thread = ThreadState()
        with torch.inference_mode(False):
            self.anchor = torch.zeros((), requires_grad=True)
        self.captured: dict[str, torch.Tensor] | None = None
        """Gradients of weights that user code has asked for, on the host, while it does."""
        self._wanted: frozenset[str] = frozenset()
        self._worker = worker
        self._is_collecting = False
        self._devices = {device.torch_device: device for device in cluster.devices}
        self.departures = Departures(cluster.devices, self.travelling_nbytes, lambda: self.plan.num_microbatches)
        self.landings = Landings(cluster.devices, self.travelling_nbytes)
        self.memory = DeviceMemory(
            plan,
            counters,
            self.weights,
            self.departures,
            self.landings,
            lambda: self.is_differentiating or self.is_recomputing,
            cluster.trim_device_memory,
        )
        layered = {name for pack in plan.packs for name in pack.parameters}
        self.glue = GlueWeights(
            self.parameters,
            self.parameters.keys() - layered,
            counters,
            self.spare_nbytes,
            self.weights.await_masters,
            host_is_device=cluster.host_is_device,
        )
        self.narrow = [frozenset(pack.narrow) for pack in plan.packs]

    # Where things are -------------------------------------------------------------------------------------------------

    def device_of(self, pack: int, microbatch: int) -> Device:
        return self.cluster.devices[self.plan.device(pack, microbatch)]

    def is_device(self, device: torch.device) -> bool:
        return device in self._devices

    def find_device(self, device: torch.device) -> Device | None:
        """The device of the cluster that torch means; None for others."""
        return self._devices.get(device)

    def send(self, tensor: torch.Tensor, source: Device, target: Device, ready: Event | None = None) -> Arrival:
        """Copy a tensor from device to device; `ready`: when it is computed, None for now."""
        self.counters.p2p_bytes += tensor.nbytes
        departures, landings = self.departures, self.landings
        return self.memory.with_room(target, lambda: send(tensor, source, target, departures, ready, landings))

    def turn(self, device: Device) -> None:
        """Another microbatch comes to the device."""
        self.departures.turn(device)
        self.landings.turn(device)

    def weight_name(self, tensor: torch.Tensor) -> str | None:
        """The name of a master; None for any other tensor."""
        return self.names.get(id(tensor)) if isinstance(tensor, nn.Parameter) else None

    def slot_pack(self, name: str, pack: int) -> int | None:
        """`pack` if the weight has a place in its gradient slot."""
        return pack if name in self.plan.packs[pack].parameters else None

    def is_weight_memory(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor lies in a device copy of weights, which the plan moves, not the user's code."""
        return self.glue.holds(tensor) or self.weights.holds(tensor)

    def notice_write(self, tensor: torch.Tensor) -> None:
        """User code has written a tensor off the segment's device: if it is a master, its copies are out of date."""
        if self.is_master(tensor):
            self.masters_written()

    def before_write(self, tensor: torch.Tensor) -> None:
        """User code is about to write a tensor: copies of a master to the devices must have been read by then."""
        if self.is_master(tensor):
            self._await_swap_ins()
            self.glue.before_write(tensor.data_ptr())

    def _await_swap_ins(self) -> None:
        self.weights.finish_enqueuing()
        for device in self.cluster.devices:
            device.record(Lane.SWAP_IN).synchronize()

    def is_master(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor lies in the memory of masters."""
        is_on_host = tensor.device.type == "cpu" and not self.is_device(tensor.device)
        if not is_on_host or tensor.layout != torch.strided:
            return False
        return self.weights.is_master_memory(tensor)

    def is_out_of_date(self, root: nn.Module) -> bool:
        """Whether parameters came, went or changed their kind since this was made."""
        now, then = dict(root.named_parameters()), self.parameters
        return list(now) != list(then) or any(
            parameter is not then[name] or (parameter.requires_grad, parameter.dtype, parameter.shape) != kind
            for (name, parameter), kind in zip(now.items(), self._kinds, strict=True)
        )

    # What is running --------------------------------------------------------------------------------------------------

    def take_off_watcher(self) -> TorchFunctionMode | None:
        """What has been taken off the thread, to be pushed again; None if the watcher does not lie on top."""
        watcher = self.watcher
        if watcher is not None and _get_current_function_mode() is watcher:  # type: ignore[no-untyped-call]
            _pop_mode()  # type: ignore[no-untyped-call]
            return watcher
        return None

    @contextmanager
    def capturing(self, names: frozenset[str]) -> Iterator[dict[str, torch.Tensor]]:
        """Gradients of these weights that are computed within are kept apart; those of all others are dropped."""
        self.captured, self._wanted = {}, names
        try:
            yield self.captured
        finally:
            self.captured = None

    @torch.no_grad()
    def capture(self, name: str, gradient: torch.Tensor) -> None:
        """One use of a weight has been differentiated while user code asked for it."""
        assert self.captured is not None
        if name in self._wanted:
            arrived = gradient.detach().to("cpu", self.parameters[name].dtype)
            self.captured[name] = self.captured[name] + arrived if name in self.captured else arrived

    def collect_later(self) -> None:
        """Called within a backward that user code runs by itself: at its end, gradients go to `Parameter.grad`."""
        if not self._is_collecting:
            self._is_collecting = True
            torch.autograd.Variable._execution_engine.queue_callback(self._collect)  # type: ignore[attr-defined]

    def _collect(self) -> None:
        self._is_collecting = False
        # User code may be running, and its function mode would take our tensors for its own.
        with self.cluster.activate(continues=True), torch._C.DisableTorchFunction():
            if self.is_holding:
                self.gradients.hold()
            else:
                self.gradients.finish(lambda names: None)
                self._await_swap_ins()
                self.masters_written()  # most likely an update follows
        self._worker.drain()

    def wait(self) -> None:
        """Return when no weights are updated or read any more."""
        self._worker.wait()
        self.weights.wait()

    def settle(self) -> None:
        """Return when no weights are updated or read any more; raise what an update has raised."""
        self._worker.drain()
        self.weights.drain()

    def leave_pack(self) -> None:
        """User code goes on to another pack: what it used beside weights of layers may go."""
        self.glue.clear()
        self.buffers.drop_clean()

    def take_up(self, plan: Plan) -> None:
        """Go on under another plan for the same packs."""
        self.weights.take_up(plan)
        if plan.resident != self.plan.resident:
            self.cluster.trim_device_memory()
        self.plan = plan

    def allocate(self) -> None:
        """Make all slots that a training step will use, as far as there is room."""
        for device in self.cluster.devices:
            self.memory.with_room(device, functools.partial(self.weights.allocate, device))
        self.gradients.allocate()

    def let_nothing_stay(self) -> None:
        """The step is none for which the plan was made: go on as if memory were short everywhere, though it is not."""
        self.plan = dataclasses.replace(self.plan, keep=(), stash_stays=(), peak_bytes=())
        for device in self.cluster.devices:
            self.memory.let_go(device)

    def masters_written(self, *, trained_only: bool = False) -> None:
        """Somebody has written masters, or may do so: all that was made of them is out of date."""
        self.weights.expect_writes(trained_only=trained_only)
        self.weights.forget_casts()
        self.release_all()

    def release_all(self) -> None:
        """No weights are needed on any device for now."""
        self.glue.clear()
        self.weights.release_all()

    def discard(self) -> None:
        """Drop what a step has left behind when it is given up; masters stay as they are."""
        self.depth = 0
        self.is_recomputing = False
        self.is_differentiating = False
        self.is_holding = False
        self.objects = None
        self.captured = None
        self._is_collecting = False
        self.watching = None
        self.weights.upcoming = {}
        self.departures.let_go()
        self.landings.let_go()
        self.buffers.discard()
        self.masters_written()
        self.weights.drain()
        self.weights.end_updates()
        self.gradients.discard()
