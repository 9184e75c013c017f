"""The engine: carries a plan out, layer-major, over the user's own code.

It stands between the strategy, which says what to run, and the rooms that know how: a training step is `step`, steps that
share a pass are `together`, what the running code meets is `user_code`, what is where is `state`.
"""

import dataclasses
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import nn

from harmony_lightning.decomposer.decomposition import Decomposition
from harmony_lightning.hardware.device import Cluster
from harmony_lightning.hardware.out_of_memory import OUT_OF_MEMORY
from harmony_lightning.plan import Plan
from harmony_lightning.runtime.counters import Counters
from harmony_lightning.runtime.derivatives import Uncuttable
from harmony_lightning.runtime.derived import find_derived
from harmony_lightning.runtime.host_arithmetic import HostArithmetic
from harmony_lightning.runtime.measuring import Measuring
from harmony_lightning.runtime.microbatch import Microbatch
from harmony_lightning.runtime.randomness import StepStreams
from harmony_lightning.runtime.rest import Rest
from harmony_lightning.runtime.site import Interposition
from harmony_lightning.runtime.state import RuntimeState
from harmony_lightning.runtime.step import Settle, TrainingStep
from harmony_lightning.runtime.thread_state import Autocast
from harmony_lightning.runtime.together import SharedPass, Together
from harmony_lightning.runtime.trace import Trace
from harmony_lightning.runtime.updates.gradient_swap_out import OnComplete
from harmony_lightning.runtime.updates.update import JustInTimeUpdate
from harmony_lightning.runtime.user_code import UserCode
from harmony_lightning.runtime.weights.narrow import WeightUses
from harmony_lightning.runtime.worker import HostWorker

log = logging.getLogger(__name__)


class Engine:
    """Runs steps of one root module under one plan. Between `load` and `close` the module's calls come here."""

    def __init__(self, root: nn.Module, cluster: Cluster) -> None:
        self.root = root
        self.cluster = cluster
        self.counters = Counters()
        self.worker = HostWorker(cluster)
        self.trace = Trace()
        self.uses = WeightUses()
        self.measuring = Measuring(cluster)
        self.rest = Rest(cluster)
        self._interposition = Interposition(root)
        self._host_arithmetic = HostArithmetic()
        self._streams = StepStreams(cluster.devices)
        self._code: UserCode | None = None
        self._microbatches: Sequence[Microbatch] = ()
        self._step: TrainingStep | None = None
        self._shared_pass: SharedPass | None = None

    # Between steps ----------------------------------------------------------------------------------------------------

    def load(self, plan: Plan, decomposition: Decomposition) -> None:
        """Bring the root module under this plan: arenas, slots and interposed calls."""
        self.end_step()
        self.settle()
        if self._code is not None:
            self.rest.bring_home()
            self._unload()
            self.cluster.trim_device_memory()
        with self.cluster.activate():
            state = RuntimeState(self.root, self.cluster, plan, self.counters, self.worker, self.uses, self.measuring)
        self.rest.load(state, find_derived(self.root))
        self._code = UserCode(state, lambda: self.trace, self.notice)
        self._interposition.install(
            packs={name: index for index, pack in enumerate(plan.packs) for name in pack.layers},
            layers={layer.name: layer.weights for layer in decomposition.layers},
            names=state.names,
            dispatch=self._code.dispatch,
        )

    @property
    def _user_code(self) -> UserCode:
        assert self._code is not None, "no plan is loaded"
        return self._code

    @property
    def state(self) -> RuntimeState:
        return self._user_code.state

    @property
    def plan(self) -> Plan:
        return self.state.plan

    @property
    def is_loaded(self) -> bool:
        return self._code is not None

    @property
    def running_microbatch(self) -> int:
        """Index of the microbatch whose code is running; 0 if none is."""
        microbatch = self._user_code.microbatch
        return microbatch.index if microbatch is not None else 0

    @property
    def has_loss(self) -> bool:
        """Whether some microbatch of the step returned a loss that can be differentiated."""
        return self._step is not None and self._step.has_loss

    @property
    def is_cut(self) -> bool:
        """Whether the microbatches of the step are cut at pack borders."""
        return self._step is None or self._step.is_cut

    def resize(self, microbatch_size: int, num_microbatches: int) -> None:
        """Note in the plan what a minibatch turned out to be; packs stay as they are."""
        self.state.plan = dataclasses.replace(
            self.plan, microbatch_size=microbatch_size, num_microbatches=num_microbatches
        )

    @property
    def calls(self) -> Counter[str]:
        """Of layers, in the forward of the last training step."""
        return Counter(self._user_code.calls)

    def take_up(self, plan: Plan, calls: Counter[str] | None = None) -> None:
        """Go on under a plan that lets something else stay on the devices, in training steps with no more than these
        `calls` of layers."""
        self._user_code.expected_calls = calls
        if plan != self.plan:
            self.end_step()
            self.settle()
            with self.cluster.activate():
                self.state.take_up(plan)

    def _begin_measuring(self, *, trains: bool) -> None:
        if self.measuring.is_due(trains=trains):
            with self.cluster.activate(continues=True):
                if trains:
                    self.state.allocate()
                self.measuring.begin(self.plan, self.state.weights.slot_nbytes, trains=trains)

    def is_out_of_date(self) -> bool:
        """Whether parameters came, went or changed their kind since `load`."""
        return self.state.is_out_of_date(self.root)

    def refusing(self) -> AbstractContextManager[None]:
        """Within, nobody may call the module's layers."""
        return self._interposition.refusing()

    def close(self) -> None:
        """Give the module its own calls back and let go of devices and threads. May be called twice."""
        self.abort()
        self._interposition.remove()
        if self._code is not None:
            try:
                self.rest.bring_home()
            except Exception:
                log.exception("the newest weights could not be brought to the host")
            self._unload()
        self.worker.close()
        self.cluster.close()

    def _unload(self) -> None:
        self.state.weights.close()
        self.rest.load(None)
        self._code = None

    def end_step(self) -> None:
        """Nobody will ask for a backward any more, if none has been."""
        if self._microbatches:
            self.abort()

    def abort(self) -> None:
        """End all microbatches where they stand and drop what they left behind; weights stay as they are."""
        microbatches, self._microbatches = self._microbatches, ()
        self._step = self._shared_pass = None
        self.rest.has_settled = True
        if self._code is not None:
            self.measuring.abort()
            self._code.kill(microbatches)
            self._code.stash.end()
            self.rest.wait()
            try:
                self.state.discard()
            except Exception:
                log.exception("the host worker failed while the step was being given up")

    # Steps ------------------------------------------------------------------------------------------------------------

    def forward(
        self,
        functions: Sequence[Callable[[], Any]],
        shares: Sequence[float],
        settle: Settle,
        factor: float = 1.0,
        *,
        is_cut: bool = True,
        outside: Autocast | None = None,
    ) -> list[Any]:
        """Run every function as a microbatch, to its end, with the backward of its last segment.

        With `is_cut` False microbatches run one after the other, each in one piece with its whole backward: packs are
        swapped for every microbatch, but user code may take derivatives of anything.

        Args:
            functions: one call of user code per microbatch.
            shares: what each microbatch's loss counts in the minibatch's.
            settle: takes a result apart.
            factor: the gradient of the minibatch's loss that `backward` is expected to be given.
            outside: what is in force where `backward` will be called; None if it is the same here.

        Returns:
            The results; losses in them are detached.

        Raises:
            Uncuttable: user code cannot be cut. Everything is as before the step, but for what user code itself has
                written; the next step must be the same with `is_cut` False.
            DeviceOutOfMemoryError, torch.OutOfMemoryError: the same; the next step may be this one, under another plan.
        """
        self.end_step()
        self.state.weights.begin()
        # Weights at rest may have been written by anybody, others only by their updates.
        self.state.weights.forget_casts(None if self.rest.has_settled else self.rest.updated)
        self.state.is_learning = not self.trace.is_complete
        self.state.outside = outside
        streams = self._streams.begin(len(functions))
        step = self._step = TrainingStep(self._user_code, functions, streams, shares, settle, factor, is_cut=is_cut)
        self._microbatches = step.microbatches
        if is_cut:
            self._begin_measuring(trains=True)
        self._user_code.calls.clear()
        try:
            with self._user_code.active(continues=True), self._guarded():
                results = step.forward()
                self.rest.finish_updates()  # of packs that nobody has called
                self.state.buffers.flush()
            self.rest.derive()
        except (Uncuttable, *OUT_OF_MEMORY):
            self._streams.undo()
            if not self.trace.is_complete:
                self.trace = Trace()
            raise
        finally:
            self._streams.end()
        self.counters.steps += 1
        self.counters.num_microbatches += len(functions)
        self.trace.end_step()
        self.state.is_learning = False
        return results

    def backward(self, factor: float, on_complete: OnComplete, on_device: JustInTimeUpdate | None = None) -> None:
        """Run what is left of the backward of the step; `settle` waits for gradients and updates still on their way then.

        Args:
            factor: gradient of the minibatch's loss.
            on_complete: called on the worker thread with the names of weights whose `.grad` has become complete.
            on_device: the update to be taken on devices, where the plan says so; None if all are the host's.
        """
        assert self._step is not None, "backward comes behind forward"
        self.rest.has_settled = False
        with self._user_code.active(continues=True), self._guarded():
            self._step.backward(factor, on_complete, on_device)
            self.state.buffers.flush()
            self._end()
            self.measuring.end()
        if self.state.weights.has_leaked:  # nothing will tell when they are written
            self.settle()
            self.rest.bring_home()

    def run(self, function: Callable[[], Any], *, trains: bool = False) -> Any:
        """Run user code in one piece, with packs brought in as they are called: evaluation, or training whose code
        differentiates and updates by itself (`trains`)."""
        code, microbatch = self._user_code, Microbatch(self.state, 0, function, None, is_cut=False)
        with self._from_rest([microbatch], self._host_arithmetic if trains else None):
            microbatch.open(0)
            with code.running(microbatch):
                result = function()
        return result

    def run_together(self, functions: Sequence[Callable[[], Any]]) -> Together:
        """Run user code that trains nothing: all functions go through each pack before the next one is brought in, and
        come out as if each had been run after the one before (`together`)."""
        shared = self._shared_pass = SharedPass(self._user_code, functions)
        trace, self.trace = self.trace, Trace()  # of training: other calls in another order
        try:
            with self._from_rest(shared.microbatches):
                together = shared.run()
        finally:
            self._shared_pass, self.trace = None, trace
        return together

    @contextmanager
    def _from_rest(
        self, microbatches: Sequence[Microbatch], host_arithmetic: HostArithmetic | None = None
    ) -> Iterator[None]:
        """The code within runs these. They find everything at rest, and leave nothing for a backward."""
        self.settle()
        self.state.weights.begin()
        self.state.weights.forget_casts()
        self._microbatches = microbatches
        self._begin_measuring(trains=False)
        with self._user_code.active(host_arithmetic), self._guarded():
            yield
            self.state.buffers.flush()
            self._end()
            self.measuring.end()
        self.rest.derive()

    def _end(self) -> None:
        microbatches, self._microbatches = self._microbatches, ()
        self._step = None
        for microbatch in microbatches:
            microbatch.forget()
        self.state.release_all()
        self._user_code.stash.end()
        self.state.departures.let_go()
        self.state.landings.let_go()
        if self.rest.has_settled:
            self.rest.wait()

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """On any exception, leave nothing running behind."""
        try:
            yield
        except BaseException:
            self.abort()
            raise

    # Beside the steps -------------------------------------------------------------------------------------------------

    def beside(self, closure: Callable[[], Any]) -> AbstractContextManager[Callable[[], Any]]:
        """For an optimizer's step: the code within works on the host, on masters, though it may be called from user code.
        The closure, in the form that is given back, is user code again."""
        return self._user_code.beside(closure, self.rest, self.end_step)

    def aside(self) -> AbstractContextManager[None]:
        """The code within is not between layers, though it may be called from there: it computes where its tensors are."""
        return self._user_code.aside()

    @contextmanager
    def aside_in_turn(self) -> Iterator[None]:
        """The same for code that must be run in the order of the steps."""
        if self._shared_pass is not None:
            self._shared_pass.take_turn()
        with self.aside():
            yield

    def settle(self) -> None:
        """Return when weights, gradients and states of optimizers are those of the end of the step, for anybody to see.

        Raises:
            What an update has raised.
        """
        if not self.rest.has_settled:
            with self._guarded():
                self.rest.finish_updates()
            self.rest.wait_between_steps()

    def notice(self, arguments: Any) -> None:
        """User code is about to work with these: what is still being updated must be finished first."""
        if not self.rest.is_asked_for(arguments):
            return
        if self._microbatches:
            self.rest.finish_updates()
        else:
            self.settle()
            self.state.masters_written(trained_only=True)  # or will be
        self.rest.bring_home()

    def notice_between(self, arguments: Any, *, shows: bool, leaks: bool) -> None:
        """The same for user code between steps, which may write masters that it is shown; for good if their memory `leaks`
        to others than torch."""
        self.notice(arguments)
        if self._code is not None and shows:
            self.state.weights.notice_look(arguments, leaks=leaks)
