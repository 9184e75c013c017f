"""The engine: carries a plan out, layer-major, over the user's own code.

    forward     all microbatches go through pack 0, then through pack 1, ...; in the last pack each one finishes and
                runs its backward at once (fused), so that logits of only one microbatch are ever alive
    backward    all microbatches go back through the last but one pack, ..., pack 0; a pack whose last segment is done
                sends its gradients to the host, where `on_complete` may update its weights while others still compute

Which pack comes next is read off the microbatches themselves: the foremost pack that one of them waits for. So loops,
skipped layers and other orders than the plan's need no special case, only more swapping.
"""

import dataclasses
import logging
import os
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import greenlet
import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks
from torch.utils import _pytree as pytree

from harmony_lightning.decomposer.decomposition import Decomposition
from harmony_lightning.errors import DeviceOutOfMemoryError
from harmony_lightning.hardware.device import Cluster, Device, Lane
from harmony_lightning.plan import Plan
from harmony_lightning.runtime.checkpointing import transparent_checkpoints
from harmony_lightning.runtime.counters import Counters
from harmony_lightning.runtime.derivatives import Uncuttable, yielding_hooks
from harmony_lightning.runtime.derived import Derived, derive_on_host, find_derived
from harmony_lightning.runtime.functions import watched_functions
from harmony_lightning.runtime.glue import Glue
from harmony_lightning.runtime.glue_weights import WeightReference
from harmony_lightning.runtime.gradients import OnComplete
from harmony_lightning.runtime.host_arithmetic import HostArithmetic
from harmony_lightning.runtime.layer import call_layer, is_layer_hook
from harmony_lightning.runtime.lookahead import Lookahead
from harmony_lightning.runtime.microbatch import Microbatch
from harmony_lightning.runtime.randomness import Replay, Stream, draw_step_seed, microbatch_seed
from harmony_lightning.runtime.segment import Segment, add_place
from harmony_lightning.runtime.site import Interposition, Site
from harmony_lightning.runtime.stash import Stash
from harmony_lightning.runtime.state import RuntimeState
from harmony_lightning.runtime.together import Raised, Together, Turns
from harmony_lightning.runtime.trace import Trace
from harmony_lightning.runtime.transfer import Arrival
from harmony_lightning.runtime.update import JustInTimeUpdate
from harmony_lightning.runtime.worker import HostWorker

log = logging.getLogger(__name__)


Settle = Callable[[Any], tuple[torch.Tensor | None, Any]]
"""Takes a microbatch's result apart: its loss, and the result with that loss detached."""


class Engine:
    """Runs steps of one root module under one plan. Between `load` and `close` the module's calls come here."""

    def __init__(self, root: nn.Module, cluster: Cluster) -> None:
        self.root = root
        self.cluster = cluster
        self.counters = Counters()
        self.worker = HostWorker(cluster)
        self.trace = Trace()
        self.has_loss = False
        """Whether some microbatch of the step returned a loss that can be differentiated."""
        self.has_settled = True
        """Whether weights, gradients and states of optimizers are at rest."""
        self.is_updated: Callable[[torch.Tensor], bool] = lambda tensor: False
        """Whether updates may write a tensor."""
        self.is_cut = True
        """Whether the microbatches of the step are cut at pack borders."""
        _engines.add(self)
        self._interposition = Interposition(root)
        self._host_arithmetic = HostArithmetic()
        self._derived: list[Derived] = []
        self._state: RuntimeState | None = None
        self._stash: Stash | None = None
        self._current: Microbatch | None = None
        self._microbatches: list[Microbatch] = []
        self._is_aborting = False
        self._turns: Turns | None = None
        """Of steps that share a pass."""
        self._segments_left: Counter[int] = Counter()
        """By pack: segments whose backward has not run."""
        self._uses_left: Counter[str] = Counter()
        """By weight: segments that use it and whose backward has not run."""
        self._expected_factor = 1.0
        self._interrupted_seed: int | None = None
        """Of a step that was given up and will be run again in one piece."""

    # Between steps ------------------------------------------------------------------------------------------------

    def load(self, plan: Plan, decomposition: Decomposition) -> None:
        """Bring the root module under this plan: arenas, slots and interposed calls."""
        self.settle()
        if self._state is not None:
            self._state.close()
            self._state = None
        with self.cluster.activate():
            self._state = state = RuntimeState(self.root, self.cluster, plan, self.counters, self.worker)
        self._derived = list(find_derived(self.root))
        self._stash = Stash(
            self._stashing_segment,
            state.is_weight_memory,
            self._refer,
            state.glue.restore,
            self.counters,
            state.departures,
        )
        self._interposition.install(
            packs={name: index for index, pack in enumerate(plan.packs) for name in pack.layers},
            layers={layer.name: layer.weights for layer in decomposition.layers},
            names=state.names,
            dispatch=self._dispatch,
        )

    @property
    def state(self) -> RuntimeState:
        assert self._state is not None, "no plan is loaded"
        return self._state

    @property
    def plan(self) -> Plan:
        return self.state.plan

    @property
    def is_loaded(self) -> bool:
        return self._state is not None

    @property
    def running_microbatch(self) -> int:
        """Index of the microbatch whose code is running; 0 if none is."""
        return self._current.index if self._current is not None else 0

    def resize(self, microbatch_size: int, num_microbatches: int) -> None:
        """Note in the plan what a minibatch turned out to be; packs stay as they are."""
        self.state.plan = dataclasses.replace(
            self.plan, microbatch_size=microbatch_size, num_microbatches=num_microbatches
        )

    def is_out_of_date(self) -> bool:
        """Whether parameters came, went or changed their kind since `load`."""
        now, then = dict(self.root.named_parameters()), self.state.parameters
        return list(now) != list(then) or any(
            parameter is not then[name] or (parameter.requires_grad, parameter.dtype, parameter.shape) != kind
            for (name, parameter), kind in zip(now.items(), self.state.kinds, strict=True)
        )

    def close(self) -> None:
        """Give the module its own calls back and let go of devices and threads. May be called twice."""
        self.abort()
        self._interposition.remove()
        if self._state is not None:
            self._state.close()
        self.worker.close()
        self.cluster.close()
        self._state = self._stash = None

    def end_step(self) -> None:
        """Nobody will ask for a backward any more, if none has been."""
        if self._microbatches:
            self.abort()

    def abort(self) -> None:
        """End all microbatches where they stand and drop what they left behind; weights stay as they are."""
        microbatches, self._microbatches = self._microbatches, []
        self._kill(microbatches)
        self._turns = None
        self._segments_left.clear()
        self._uses_left.clear()
        self.has_settled = True
        if self._state is not None and self._stash is not None:
            self._stash.end()
            self._come_to_rest()
            try:
                self._state.discard()
            except Exception:
                log.exception("the host worker failed while the step was being given up")

    def _kill(self, microbatches: Sequence[Microbatch]) -> None:
        self._is_aborting, self._current = True, None
        for microbatch in microbatches:
            microbatch.kill()
        self._is_aborting, self._current = False, None

    # A training step ----------------------------------------------------------------------------------------------

    def forward(
        self,
        functions: Sequence[Callable[[], Any]],
        shares: Sequence[float],
        settle: Settle,
        factor: float = 1.0,
        *,
        is_cut: bool = True,
    ) -> list[Any]:
        """Run every function as a microbatch, to its end, with the backward of its last segment.

        With `is_cut` False microbatches run one after the other, each in one piece with its whole backward: packs are
        swapped for every microbatch, but user code may take derivatives of anything.

        Args:
            functions: one call of user code per microbatch.
            shares: what each microbatch's loss counts in the minibatch's.
            settle: takes a result apart.
            factor: the gradient of the minibatch's loss that `backward` is expected to be given.

        Returns:
            The results; losses in them are detached.

        Raises:
            Uncuttable: user code cannot be cut. Everything is as before the step, but for what user code itself has
                written; the next step must be the same with `is_cut` False.
        """
        self.end_step()
        self._expected_factor = factor
        self.has_loss = False
        self.is_cut = is_cut
        streams: list[Stream | None] = [None]
        step_seed, self._interrupted_seed = self._interrupted_seed, None
        if len(functions) > 1:
            if step_seed is None:
                step_seed = draw_step_seed()
            streams = [Stream(microbatch_seed(step_seed, m)) for m in range(len(functions))]
        own = Stream(None)
        own.suspend()
        own_on_devices = [(device, device.random_state()) for device in self.cluster.devices]
        microbatches = [
            Microbatch(self.state, m, function, stream, is_cut=is_cut)
            for m, (function, stream) in enumerate(zip(functions, streams, strict=True))
        ]
        self._microbatches = microbatches
        try:
            with self._active(continues=True), self._guarded():
                self.state.prefetch_first()
                if not is_cut:
                    for microbatch in microbatches:
                        self._run(microbatch, shares[microbatch.index], settle, first=True)
                        self._leave()
                        self.state.release_all()
                else:
                    with self._visit(0, microbatches, self._next_forward(0, microbatches)):
                        for microbatch in microbatches:
                            self._run(microbatch, shares[microbatch.index], settle, first=True)
                while waiting := [m for m in microbatches if not m.is_done]:
                    pack = min(m.waits_for for m in waiting if m.waits_for is not None)
                    visitors = [m for m in waiting if m.waits_for == pack]
                    with self._visit(pack, visitors, self._next_forward(pack, waiting)):
                        visitors[0].send_ahead()
                        for microbatch, following in zip(visitors, [*visitors[1:], None], strict=True):
                            if following is not None and self.plan.prefetch:
                                following.send_ahead()
                            self._run(microbatch, shares[microbatch.index], settle)
                self._finish_updates()  # of packs that nobody has called
                self.state.buffers.flush()
            derive_on_host(self._derived)
        except Uncuttable:
            self._interrupted_seed = step_seed
            if not self.trace.is_complete:
                self.trace = Trace()
            own.resume()
            _restore(own_on_devices)
            raise
        finally:
            if len(functions) > 1:
                own.resume()
                _restore(own_on_devices)
        for microbatch in microbatches:
            microbatch.replaced.clear()  # no user code will ask any more
        self.counters.steps += 1
        self.counters.num_microbatches += len(functions)
        self.trace.end_step()
        results = [microbatch.result for microbatch in microbatches]
        for microbatch in microbatches:
            microbatch.result = None
        return results

    def backward(self, factor: float, on_complete: OnComplete, on_device: JustInTimeUpdate | None = None) -> None:
        """Run what is left of the backward of the step; `settle` waits for gradients and updates still on their way then.

        Args:
            factor: gradient of the minibatch's loss.
            on_complete: called on the worker thread with the names of weights whose `.grad` has become complete.
            on_device: the update to be taken on devices, where the plan says so; None if all are the host's.
        """
        microbatches = self._microbatches
        if factor != self._expected_factor:
            self._rescale(factor / self._expected_factor)
        self.has_settled = False
        with self._active(continues=True), self._guarded():
            self.state.gradients.begin()
            self.state.begin_updates(on_device)
            for pack in reversed(range(len(self.plan.packs))):
                if not self._segments_left[pack]:
                    self._send(pack, on_complete)
            ahead = Lookahead(microbatches if self.plan.prefetch else (), self._bring_stash_back)
            while left := [m for m in microbatches if m.segments]:
                pack = max(m.segment.pack for m in left)
                visitors = [m for m in left if m.segment.pack == pack]
                with self._visit(pack, visitors, self._next_backward(pack, left)):
                    self.state.prefetch_states(pack)
                    for microbatch in visitors:
                        while microbatch.segments and microbatch.segment.pack == pack:
                            ahead.begin(microbatch.segment)
                            self._backward_segment(microbatch)
                    if not self._segments_left[pack]:
                        self._send(pack, on_complete)  # an update here wants the weights
            self.state.end_updates()
            self.state.gradients.finish(on_complete)
            self.state.buffers.flush()
            self._end(microbatches)

    def run(self, function: Callable[[], Any], *, trains: bool = False) -> Any:
        """Run user code in one piece, with packs brought in as they are called: evaluation, or training whose code
        differentiates and updates by itself (`trains`)."""
        self.settle()
        microbatch = Microbatch(self.state, 0, function, None, is_cut=False)
        self._microbatches = [microbatch]
        with self._active(self._host_arithmetic if trains else None), self._guarded():
            microbatch.open(0)
            self._current = microbatch
            try:
                result = function()
            except Exception as error:
                add_place(error, "in the user's code between layers", microbatch.segment)
                raise
            finally:
                self._current = None
            self.state.buffers.flush()
            self._end([microbatch])
        derive_on_host(self._derived)
        return result

    # Steps that train nothing ---------------------------------------------------------------------------------------

    def run_together(self, functions: Sequence[Callable[[], Any]]) -> Together:
        """Run user code that trains nothing: all functions go through each pack before the next one is brought in, and
        come out as if each had been run after the one before (`together`)."""
        self.settle()
        microbatches = [Microbatch(self.state, m, function, None, is_cut=True) for m, function in enumerate(functions)]
        self._microbatches = list(microbatches)
        turns = self._turns = Turns(microbatches)
        trace, self.trace = self.trace, Trace()  # of training: other calls in another order
        try:
            with self._active(), self._guarded():
                with self._visit(0, microbatches, self._next_forward(0, microbatches)):
                    for microbatch in microbatches:
                        self._let_go_on(microbatch, turns, first=True)
                while ready := turns.ready:
                    pack = min(m.waits_for for m in ready if m.waits_for is not None)
                    visitors = [m for m in ready if m.waits_for == pack]
                    with self._visit(pack, visitors, self._next_forward(pack, turns.left)):
                        for microbatch in visitors:
                            self._let_go_on(microbatch, turns)
                self.state.buffers.flush()
                together = Together(outcomes=turns.outcomes(), obstacle=turns.obstacle)
                self._end(microbatches)
        finally:
            self._turns, self.trace = None, trace
        derive_on_host(self._derived)
        return together

    def _let_go_on(self, microbatch: Microbatch, turns: Turns, first: bool = False) -> None:
        if microbatch not in turns.left:
            return
        is_first = microbatch is turns.first
        device = self.state.device_of(0 if microbatch.waits_for is None else microbatch.waits_for, microbatch.index)
        drawn = Replay(device)
        self.state.departures.turn(device)
        self._current = microbatch
        try:
            if first:
                microbatch.start(0)
            else:
                microbatch.resume()
        except Uncuttable:
            turns.obstacle = "it takes derivatives across layers"
            self._kill(turns.give_up_from(microbatch.index))
        except Exception as error:
            is_memory = isinstance(error, DeviceOutOfMemoryError | torch.OutOfMemoryError)
            if is_memory and len(self._microbatches) > 1:
                turns.obstacle = f"{len(self._microbatches)} at once do not fit ({error})"
                self._kill(turns.give_up_from(microbatch.index))
            else:
                add_place(error, "in the user's code between layers", microbatch.segment)
                microbatch.end(Raised(error))
                self._kill(turns.give_up_from(microbatch.index + 1))
        finally:
            self._current = None
        drawn.keep_what_was_drawn(device)
        if not drawn.is_empty:
            turns.obstacle = "it draws random numbers"
            if not is_first:
                drawn.begin(device)
                self._kill(turns.give_up_from(microbatch.index))

    def take_turn(self) -> None:
        """Called from user code of one of several steps: wait until all before it have ended."""
        microbatch, turns = self._current, self._turns
        if turns is not None and microbatch is not None and not self.state.depth:
            while microbatch is not turns.first:
                microbatch.park(microbatch.segment.pack, awaits_turn=True)

    # Beside the steps -------------------------------------------------------------------------------------------------

    @contextmanager
    def beside(self, closure: Callable[[], Any]) -> Iterator[Callable[[], Any]]:
        """For an optimizer's step: the code within works on the host, on masters, though it may be called from user code.
        The closure, in the form that is given back, is user code again."""
        current = self._current

        def user_code() -> Any:
            self._put_current(current)
            try:
                return closure()
            finally:
                self._current = None
                if current is None:
                    self.end_step()
                self._come_to_rest()

        self._current = None
        if current is not None:
            self._come_to_rest()  # a graph that user code has left standing may still be on its way to the host
        try:
            yield user_code
        finally:
            self._put_current(current)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """The code within is not between layers, though it may be called from there: it computes where its tensors are."""
        current, self._current = self._current, None
        try:
            yield
        finally:
            self._current = current

    @contextmanager
    def aside_in_turn(self) -> Iterator[None]:
        """The same for code that must be run in the order of the steps."""
        self.take_turn()
        with self.aside():
            yield

    def _put_current(self, microbatch: Microbatch | None) -> None:
        self._current = microbatch
        if microbatch is not None:
            self.state.release_all()  # masters have been written

    def _end(self, microbatches: Sequence[Microbatch]) -> None:
        for microbatch in microbatches:
            microbatch.forget()
        self.state.release_all()
        if self._stash is not None:
            self._stash.end()
        self.state.departures.let_go()
        self._microbatches = []
        if self.has_settled:
            self._come_to_rest()

    def settle(self) -> None:
        """Return when weights, gradients and states of optimizers are those of the end of the step, for anybody to see.

        Raises:
            What an update has raised.
        """
        if not self.has_settled:
            with self._guarded():
                self._finish_updates()
            self._come_to_rest()
            with self.cluster.activate():
                pass  # an emulated one looks whether that is so

    @property
    def updated(self) -> Collection[str]:
        """Names of weights whose gradients the last backward has made complete."""
        return self.state.gradients.completed

    def _finish_updates(self) -> None:
        self.has_settled = True
        self.state.settle()

    def notice(self, arguments: Any) -> None:
        """User code is about to work with these: what is still being updated must be finished first."""
        if self.has_settled:
            return
        tensors = (leaf for leaf in pytree.tree_leaves(arguments) if isinstance(leaf, torch.Tensor))
        if not any(self.is_updated(tensor) for tensor in tensors):
            return
        if self._microbatches:
            self._finish_updates()
        else:
            self.settle()
            self.state.release_all()  # the user may write them

    def _come_to_rest(self) -> None:
        """Wait for all copies: from here on anybody may write the masters, and slots may go."""
        if self._state is not None:
            self._state.finish_enqueuing()
        for device in self.cluster.devices:
            for lane in (Lane.SWAP_IN, Lane.STASH_IN, Lane.SWAP_OUT):
                device.record(lane).synchronize()

    # Dispatch of calls ------------------------------------------------------------------------------------------------

    def _dispatch(self, site: Site, args: Any, kwargs: Any) -> Any:
        microbatch = self._current
        if self.state.depth or microbatch is None:
            return site.run_plain(args, kwargs)
        if self._is_aborting:
            raise greenlet.GreenletExit
        if site.has_hooks_inside() or not site.has_own_weights(self.state.parameters):
            return site.run_plain(args, kwargs)  # as glue: the modules within are call sites of their own
        if site.pack is not None:
            if microbatch.segment.pack != site.pack and not microbatch.is_in_backward:
                if microbatch.is_cut:
                    leaves = pytree.tree_leaves((args, kwargs))
                    microbatch.park(site.pack, [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)])
                else:
                    self._change_pack(microbatch, site.pack)
            if microbatch.is_cut and not microbatch.is_in_backward:
                self.trace.record(microbatch.index, site.layer)
        try:
            keeps = microbatch.is_cut and not microbatch.is_in_backward and site.name in self.plan.keep
            result = call_layer(site, microbatch.segment, args, kwargs, keeps)
        except Exception as error:
            add_place(error, f"in layer {site.name}", microbatch.segment)
            raise
        return site.run_forward_hooks(args, kwargs, result)

    def _current_segment(self) -> Segment | None:
        return None if self.state.depth or self._current is None else self._current.segment

    def _bring(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor as an autograd function of the user's gets it."""
        segment, objects = self._current_segment(), self.state.objects
        with torch._C.DisableTorchFunction():
            if segment is not None:
                return segment.bring(tensor)
            return tensor if objects is None else objects.take(tensor)

    def _before_write(self, target: torch.Tensor) -> None:
        self.state.before_write(target)
        if self._stash is not None:
            self._stash.before_write(target)

    def _is_checkpointing(self) -> bool:
        """Whether the runtime keeps no activations of the running code: it is a layer's, or glue between such."""
        return self.state.depth > 0 or (self._current is not None and self._current.is_cut)

    def _stashing_segment(self, tensor: torch.Tensor) -> Segment | None:
        """The segment, if a tensor that it saves goes to the host. Nothing of the last pack does, as its backward is
        next; but code that goes through many weights, as a penalty on their change does, may save as much."""
        microbatch = self._current
        if microbatch is None or self.state.is_recomputing or microbatch.is_in_backward:
            return None
        segment = microbatch.segment
        if self.state.glue and not self.state.depth and not self.cluster.host_is_device:
            segment.saved_nbytes += tensor.nbytes
        is_fused = microbatch.is_cut and segment.pack == len(self.plan.packs) - 1
        goes = (self.plan.stash == "host" and not is_fused) or segment.saved_nbytes > self.state.spare_nbytes
        return segment if goes else None

    def _refer(self, tensor: torch.Tensor) -> WeightReference | None:
        """What stands for a tensor that is saved, if that is a weight."""
        if self._current is None or not self.state.glue or self.state.is_recomputing:
            return None
        segment = self._current.segment
        return self.state.glue.refer(tensor, segment.device, segment.uses)

    def _change_pack(self, microbatch: Microbatch, pack: int) -> None:
        former = microbatch.segment
        self.state.release(former.pack, former.device.index)
        self._leave()
        self.state.departures.let_go()
        if not torch.is_grad_enabled():
            microbatch.segments.clear()
        microbatch.open(pack)
        microbatch.follow(microbatch.segment.device)

    def _bring_stash_back(self, segment: Segment) -> None:
        if self._stash is not None:
            self._stash.bring_back(segment)

    # Visits -----------------------------------------------------------------------------------------------------------

    @contextmanager
    def _active(self, host_arithmetic: HostArithmetic | None = None, *, continues: bool = False) -> Iterator[None]:
        """What is in force on the thread while user code runs. The step `continues` if copies may be left in flight."""
        with ExitStack() as stack:
            stack.enter_context(self.cluster.activate(continues=continues))
            # Several of autograd's device threads at once would share one state of ours.
            stack.enter_context(torch.autograd.set_multithreading_enabled(False))
            if self._stash is not None:
                stack.enter_context(saved_tensors_hooks(self._stash.pack, self._stash.unpack))
            stack.enter_context(yielding_hooks(_steps_aside))
            stack.enter_context(transparent_checkpoints(self._is_checkpointing))
            stack.enter_context(watched_functions(self._bring))
            state = self.state
            glue = Glue(self._current_segment, state.is_device, self._before_write, lambda: state.objects, self.notice)
            glue.host_arithmetic = host_arithmetic
            stack.enter_context(glue)
            yield

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """On any exception, leave nothing running behind."""
        try:
            yield
        except BaseException:
            self.abort()
            raise

    def _run(self, microbatch: Microbatch, share: float, settle: Settle, first: bool = False) -> None:
        """Let a microbatch go on; if it comes to its end, differentiate its last segment."""
        self.state.departures.turn(microbatch.device)
        self._current = microbatch
        try:
            if first:
                microbatch.start(0)
            else:
                microbatch.resume()
        except Exception as error:
            add_place(error, "in the user's code between layers", microbatch.segment)
            raise
        finally:
            self._current = None
        if not microbatch.is_done:
            return
        loss, microbatch.result = settle(microbatch.result)
        if share == 0:
            loss = None  # it counts nothing, and may be 0 / 0
        if loss is not None:
            seed = torch.full_like(loss.detach(), share * self._expected_factor)
            microbatch.deposit(get_gradient_edge(loss), Arrival(seed, microbatch.segment.device))
        self.has_loss |= loss is not None
        del loss  # only nodes hold the graph from here on, so that backward frees it
        if not microbatch.is_cut:
            del microbatch.segments[:-1]
            self.state.is_holding = True
            self._backward_segment(microbatch)
            self.state.is_holding = False
            return
        for segment in microbatch.segments:
            self._segments_left[segment.pack] += 1
            self._uses_left.update(segment.uses.keys())
        self._backward_segment(microbatch)

    def _backward_segment(self, microbatch: Microbatch) -> None:
        names = tuple(microbatch.segment.uses)
        self.state.departures.turn(microbatch.segment.device)
        self._current = microbatch
        running = microbatch.segment
        try:
            segment = microbatch.backward_segment()
        except Exception as error:
            add_place(error, "in backward of the user's code between layers", running)
            raise
        finally:
            self._current = None
        self._segments_left[segment.pack] -= 1
        self._uses_left.subtract(names)

    @contextmanager
    def _visit(self, pack: int, visitors: Sequence[Microbatch], upcoming: dict[int, int]) -> Iterator[None]:
        """Some microbatches are in `pack`; `upcoming` tells the next pack by device, where it is known."""
        devices = dict.fromkeys(self.plan.device(pack, m.index) for m in visitors)
        leaving = [device for device in devices if upcoming.get(device, pack) != pack]
        self.state.upcoming = {device: upcoming[device] for device in leaving}
        yield
        self.state.upcoming = {}
        self._leave()
        for device in leaving:
            self.state.release(pack, device)

    def _leave(self) -> None:
        self.state.glue.clear()
        self.state.buffers.drop_clean()

    def _next_forward(self, pack: int, waiting: Sequence[Microbatch]) -> dict[int, int]:
        """By device, the pack that follows in the plan."""
        following: dict[int, int] = {}
        for later in range(len(self.plan.packs) - 1, pack, -1):
            for microbatch in waiting:
                following[self.plan.device(later, microbatch.index)] = later
        return following

    def _next_backward(self, pack: int, left: Sequence[Microbatch]) -> dict[int, int]:
        """By device, the pack whose segments come next there."""
        following: dict[int, int] = {}
        for microbatch in left:
            for segment in microbatch.segments:
                if segment.pack < pack and segment.has_graph:
                    device = segment.device.index
                    following[device] = max(segment.pack, following.get(device, -1))
        return following

    # Gradients --------------------------------------------------------------------------------------------------------

    def _send(self, pack: int, on_complete: OnComplete) -> None:
        self.state.gradients.send(pack, lambda name: self._uses_left[name] <= 0, on_complete)

    def _rescale(self, ratio: float) -> None:
        self.state.gradients.scale(ratio)
        for microbatch in self._microbatches:
            for _, parts in microbatch.pending.values():
                parts[:] = [Arrival(part.take() * ratio, part.device) for part in parts]


_engines: weakref.WeakSet[Engine] = weakref.WeakSet()


def _wait_for_all() -> None:
    for engine in list(_engines):
        if not engine.has_settled:
            engine.state.wait()  # an error would be lost here; it is raised where the engine settles


# Workers of data loaders are forked between epochs: they must find finished weights, and no thread amid its work.
os.register_at_fork(before=_wait_for_all)


def _steps_aside(pack: Any) -> bool:
    """Whether a saved-tensor hook may be taken off for a while."""
    return isinstance(getattr(pack, "__self__", None), Stash) or is_layer_hook(pack)


def _restore(random_states: Sequence[tuple[Device, torch.Tensor | None]]) -> None:
    for device, random_state in random_states:
        if random_state is not None:
            device.set_random_state(random_state)
