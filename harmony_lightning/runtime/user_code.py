"""What user code meets while it runs: its calls of layers come here, its tensors are brought to the device where it is, and
what autograd saves goes to the stash."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import greenlet
import torch
from torch.autograd.graph import saved_tensors_hooks

from harmony_lightning.runtime.activations import is_layer_hook
from harmony_lightning.runtime.checkpointing import transparent_checkpoints
from harmony_lightning.runtime.derivatives import yielding_hooks
from harmony_lightning.runtime.functions import watched_functions
from harmony_lightning.runtime.glue import Glue
from harmony_lightning.runtime.host_arithmetic import HostArithmetic
from harmony_lightning.runtime.layer.entry import call_layer
from harmony_lightning.runtime.microbatch import Microbatch
from harmony_lightning.runtime.rest import Rest
from harmony_lightning.runtime.segment import Segment, add_place
from harmony_lightning.runtime.site import Site
from harmony_lightning.runtime.stash import Stash
from harmony_lightning.runtime.stash_places import StashPlaces
from harmony_lightning.runtime.state import RuntimeState
from harmony_lightning.runtime.structure import tensors_in
from harmony_lightning.runtime.thread_state import ThreadState
from harmony_lightning.runtime.trace import Trace
from harmony_lightning.runtime.weights.glue_weights import WeightReference


class UserCode:
    """The side of the runtime that the user's code sees, under one plan.

    Attributes:
        microbatch: whose code is running; None for code that does not count as between layers.
        calls: of layers, by name, in the forward of this training step.
        expected_calls: the most of these that the plan is good for; None if it does not matter.
    """

    def __init__(self, state: RuntimeState, trace: Callable[[], Trace], notice: Callable[[Any], None]) -> None:
        """`trace` takes the calls of layers; `notice` is told what functions are about to work with."""
        self.state = state
        self._trace = trace
        self.microbatch: Microbatch | None = None
        self.stash = Stash(
            self._stashing_segment,
            state.is_weight_memory,
            self._refer,
            state.glue.restore,
            state.counters,
            state.departures,
            StashPlaces(state.cluster, state.counters, lambda: state.plan.stash_stays),
            state.memory.with_room,
            self._weigh,
            self._note_stay,
        )
        state.memory.spill = self.stash.spill
        self.calls: Counter[str] = Counter()
        self.expected_calls: Counter[str] | None = None
        self._notice = notice
        self._is_aborting = False

    # Whose code runs --------------------------------------------------------------------------------------------------

    @contextmanager
    def active(self, host_arithmetic: HostArithmetic | None = None, *, continues: bool = False) -> Iterator[None]:
        """What is in force on the thread while user code runs. The step `continues` if copies may be left in flight."""
        state = self.state
        with ExitStack() as stack:
            stack.enter_context(state.cluster.activate(continues=continues))
            # Several of autograd's device threads at once would share one state of ours.
            stack.enter_context(torch.autograd.set_multithreading_enabled(False))
            stack.enter_context(saved_tensors_hooks(self.stash.pack, self.stash.unpack))
            stack.enter_context(yielding_hooks(_steps_aside))
            stack.enter_context(transparent_checkpoints(self._is_checkpointing))
            stack.enter_context(watched_functions(self._bring))
            glue = Glue(self._current_segment, state.is_device, self._before_write, lambda: state.objects, self._notice)
            glue.host_arithmetic = host_arithmetic
            state.watcher = stack.enter_context(glue)
            state.thread = ThreadState()
            yield

    @contextmanager
    def running(self, microbatch: Microbatch, what: str = "in", segment: Segment | None = None) -> Iterator[None]:
        """The code within is this microbatch's; errors are told the place, which is `segment`, else where it is then."""
        self.microbatch = microbatch
        try:
            yield
        except Exception as error:
            add_place(error, f"{what} the user's code between layers", segment or microbatch.segment)
            raise
        finally:
            self.microbatch = None

    @contextmanager
    def aside(self) -> Iterator[None]:
        """The code within is not between layers, though it may be called from there: it computes where its tensors are."""
        microbatch, self.microbatch = self.microbatch, None
        try:
            yield
        finally:
            self.microbatch = microbatch

    @contextmanager
    def beside(
        self, closure: Callable[[], Any], rest: Rest, end_step: Callable[[], None]
    ) -> Iterator[Callable[[], Any]]:
        """For an optimizer's step: the code within works on the host, on masters, though it may be called from user code.
        The closure, in the form that is given back, is user code again; a step that it has begun outside of such is ended.
        """
        current = self.microbatch

        def put_current() -> None:
            self.microbatch = current
            if current is not None:
                self.state.masters_written(trained_only=True)
            else:
                self.state.weights.expect_writes(trained_only=True)

        def user_code() -> Any:
            put_current()
            try:
                return closure()
            finally:
                self.microbatch = None
                if current is None:
                    end_step()
                rest.wait()

        self.microbatch = None
        if current is not None:
            rest.wait()  # a graph that user code has left standing may still be on its way to the host
        try:
            yield user_code
        finally:
            put_current()

    def kill(self, microbatches: Sequence[Microbatch]) -> None:
        """End their code where it stands."""
        self._is_aborting, self.microbatch = True, None
        for microbatch in microbatches:
            microbatch.kill()
        self._is_aborting, self.microbatch = False, None

    # Calls of layers --------------------------------------------------------------------------------------------------

    def dispatch(self, site: Site, /, *args: Any, **kwargs: Any) -> Any:
        """The user's code calls a module that has weights of its own."""
        state, microbatch = self.state, self.microbatch
        if state.depth or microbatch is None:
            return site.call(*args, **kwargs)
        if self._is_aborting:
            raise greenlet.GreenletExit
        if site.has_hooks_inside() or not site.has_own_weights():
            return site.call(*args, **kwargs)  # as glue: the modules within are call sites of their own
        is_forward = microbatch.is_cut and not microbatch.is_in_backward
        if site.pack is not None:
            if microbatch.segment.pack != site.pack and not microbatch.is_in_backward:
                if microbatch.is_cut:
                    microbatch.park(site.pack, tensors_in((args, kwargs)))
                else:
                    self._change_pack(microbatch, site.pack)
            if is_forward:
                self._trace().record(microbatch.index, site.layer)
                self._count(site.layer)
        segment = microbatch.segment
        try:
            plan = state.plan
            keeps = is_forward and site.name in plan.keep
            joins = (
                microbatch.may_join
                and is_forward
                and not keeps
                and state.memory.num_together > 1
                and site.pack is not None
                and site.pack + 1 < len(plan.packs)
            )
            result = call_layer(site, segment, args, kwargs, keeps, microbatch.join if joins else None)
        except Exception as error:
            add_place(error, f"in layer {site.name}", segment)
            raise
        return site.run_forward_hooks(args, kwargs, result)

    def _count(self, layer: str) -> None:
        """What stays by plan was reckoned from the calls of a step that was measured: beyond those, nothing may."""
        self.calls[layer] += 1
        if self.expected_calls is not None and self.calls[layer] > self.expected_calls[layer]:
            self.expected_calls = None
            self.state.let_nothing_stay()

    def _change_pack(self, microbatch: Microbatch, pack: int) -> None:
        """A microbatch that is in one piece goes on to another pack without a switch."""
        former = microbatch.segment
        self.state.weights.release(former.pack, former.device.index)
        self.state.leave_pack()
        self.state.departures.let_go()
        if not torch.is_grad_enabled():
            microbatch.segments.clear()
        microbatch.open(pack)
        microbatch.follow(microbatch.segment.device)

    # Tensors ----------------------------------------------------------------------------------------------------------

    def _current_segment(self) -> Segment | None:
        return None if self.state.depth or self.microbatch is None else self.microbatch.segment

    def _bring(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor as an autograd function of the user's gets it."""
        segment, objects = self._current_segment(), self.state.objects
        with torch._C.DisableTorchFunction():
            if segment is not None:
                return segment.bring(tensor)
            if self.state.watching is not None:
                tensor = self.state.watching.take(tensor)
            return tensor if objects is None else objects.take(tensor)

    def _before_write(self, target: torch.Tensor) -> None:
        self.state.before_write(target)
        self.stash.before_write(target)

    def _is_checkpointing(self) -> bool:
        """Whether the running code is a layer's, of which the runtime keeps no activations, or glue between such."""
        return self.state.depth > 0 or self.microbatch is not None

    def _stashing_segment(self, tensor: torch.Tensor) -> Segment | None:
        """The segment, if a tensor that it saves goes to the host. Nothing of the last pack does, as its backward is
        next; but code that goes through many weights, as a penalty on their change does, may save as much."""
        microbatch, state = self.microbatch, self.state
        if microbatch is None or state.is_recomputing or microbatch.is_in_backward:
            return None
        segment = microbatch.segment
        if state.glue and not state.depth and not state.cluster.host_is_device:
            segment.saved_nbytes += tensor.nbytes
        is_fused = microbatch.is_cut and segment.pack == len(state.plan.packs) - 1
        is_to_leave = state.plan.stash == "host" and segment.pack not in state.plan.stash_stays
        goes = (is_to_leave and not is_fused) or segment.has_saved_much
        return segment if goes else None

    def _weigh(self, segment: Segment, tensor: torch.Tensor) -> None:
        """A tensor leaves for the host that might have stayed."""
        if self.state.measuring.meter is not None:
            self.state.measuring.meter.stash(segment, tensor)

    def _note_stay(self, tensor: torch.Tensor) -> None:
        """A tensor waits for backward where it is."""
        holding, microbatch, state = self.state.measuring.holding, self.microbatch, self.state
        if holding is None or microbatch is None or state.is_recomputing or microbatch.is_in_backward:
            return
        segment = microbatch.segment
        is_ours = tensor.device == segment.device.torch_device and not state.is_weight_memory(tensor)
        if is_ours and segment.pack in state.plan.stash_stays:
            holding.stash(segment, tensor)

    def _refer(self, tensor: torch.Tensor) -> WeightReference | None:
        """What stands for a tensor that is saved, if that is a weight."""
        if self.microbatch is None or not self.state.glue or self.state.is_recomputing:
            return None
        segment = self.microbatch.segment
        return self.state.glue.refer(tensor, segment.device, segment.uses)


def _steps_aside(pack: Any) -> bool:
    """Whether a saved-tensor hook may be taken off for a while."""
    return isinstance(getattr(pack, "__self__", None), Stash) or is_layer_hook(pack)
