"""A microbatch: a greenlet that runs the user's own `training_step` on a slice of the minibatch.

When it is about to enter a layer of another pack it switches back to the engine and waits there, in the middle of the
user's code, until the engine has brought the other microbatches to that point and lets it go on.
"""

import contextvars
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import greenlet
import torch
from torch.autograd.graph import GradientEdge

from harmony_lightning.hardware.device import Device, Lane
from harmony_lightning.runtime.differentiate import accumulate
from harmony_lightning.runtime.layer.joint import Joint, Waiting
from harmony_lightning.runtime.makers import refuse_others
from harmony_lightning.runtime.moved import Copies
from harmony_lightning.runtime.randomness import Stream
from harmony_lightning.runtime.running import differentiating
from harmony_lightning.runtime.segment import Replaced, Segment
from harmony_lightning.runtime.state import RuntimeState
from harmony_lightning.runtime.structure import version_of
from harmony_lightning.runtime.thread_state import Parked, ThreadState
from harmony_lightning.runtime.transfer import Arrival


class Microbatch:
    """State of one microbatch during one step.

    Attributes:
        index: within the minibatch.
        is_cut: its graph ends at pack borders and is differentiated segment by segment. False for evaluation and where
            user code differentiates by itself: then packs are brought in whenever they are called.
        may_join: other microbatches may share its calls of layers. Evaluation's may not: it equals one device to the bit.
        segments: those whose backward has not run, oldest first.
        waits_for: the pack that it is about to enter, while it is parked.
        awaits_turn: it is parked until all microbatches before it have ended.
        replaced: tensors whose later value is another object, by identity, with the original held.
    """

    def __init__(
        self,
        state: RuntimeState,
        index: int,
        function: Callable[[], Any],
        stream: Stream | None,
        *,
        is_cut: bool,
        may_join: bool = False,
    ) -> None:
        self._state = state
        self.index = index
        self.is_cut = is_cut
        self.may_join = may_join
        self.segments: list[Segment] = []
        self.waits_for: int | None = None
        self.awaits_turn = False
        self.is_done = False
        self.result: Any = None
        self.replaced: Replaced = {}
        self.pending: dict[tuple[Any, int], tuple[GradientEdge, list[Arrival]]] = {}
        """Gradients that have arrived for edges of older segments, to be added up in this order."""
        self.waiting: Waiting | None = None
        """The call of a layer in front of which it is parked, for others to join."""
        self.joint: Joint | None = None
        """What came of that."""
        self._in_backward: Segment | None = None
        self._function = function
        self._stream = stream
        self._device: Device | None = None
        """Where the random stream is while the greenlet runs."""
        self._parked: Parked | None = None
        self._luggage: Luggage | None = None
        self._greenlet: greenlet.greenlet | None = None

    @property
    def segment(self) -> Segment:
        """The running one, forward or backward."""
        return self.segments[-1] if self._in_backward is None else self._in_backward

    @property
    def device(self) -> Device:
        """Where the microbatch goes on."""
        pack = self.waits_for if self.waits_for is not None else self.segment.pack if self.segments else 0
        return self._state.device_of(pack, self.index)

    @property
    def is_in_backward(self) -> bool:
        return self._in_backward is not None

    def open(self, pack: int) -> None:
        """Begin a segment in `pack`."""
        if self.segments:
            self.segment.close()
        self.segments.append(
            Segment(self._state, pack, self.index, is_cut=self.is_cut, replaced=self.replaced, deposit=self.deposit)
        )

    def _run(self) -> None:
        self.end(self._function())

    def end(self, result: Any) -> None:
        self.result = result
        self.is_done = True

    def park(self, pack: int, needed: Iterable[torch.Tensor] = (), *, awaits_turn: bool = False) -> None:
        """Called within the greenlet: wait until the engine has come to `pack`, which first needs these tensors."""
        self.waits_for, self.awaits_turn = pack, awaits_turn
        if len(self._state.cluster.devices) > 1:
            self._luggage = Luggage(self.segment, needed)
        self.segment.leave()  # while this one waits, nothing of the past may stay on the device for it
        assert self._greenlet is not None and self._greenlet.parent is not None
        self._greenlet.parent.switch()
        self.waits_for, self.awaits_turn = None, False
        self.open(pack)
        if self._luggage is not None:
            self.segment.expect(self._luggage.sent)
            self._luggage = None

    def join(self, waiting: Waiting) -> Joint | None:
        """Called within the greenlet: wait until the engine has brought the rest of the group to this layer, or past it."""
        assert self._greenlet is not None and self._greenlet.parent is not None
        self.waiting = waiting
        self._greenlet.parent.switch()
        joint, self.joint, self.waiting = self.joint, None, None
        return joint

    @property
    def luggage_nbytes(self) -> int:
        """Bytes that `send_ahead` sends, or has sent."""
        return 0 if self._luggage is None else self._luggage.nbytes

    def send_ahead(self) -> None:
        """Called by the engine while the microbatch is parked: what it needs next may set out to the device it goes to."""
        if self._luggage is not None and self.waits_for is not None:
            self._luggage.send(self._state.device_of(self.waits_for, self.index))

    def go_on(self, device: Device) -> None:
        """Called by the engine: run to the next switch or the end, on the microbatch's `device`. Glue in front of the first
        layer is in pack 0."""
        if self._greenlet is None:
            self.open(0)
            self._greenlet = greenlet.greenlet(self._run)
            self._greenlet.gr_context = contextvars.copy_context()
        pack = self.segment.pack if self.waits_for is None else self.waits_for
        self._device = device
        base = self._state.thread
        if self._stream is not None:
            self._stream.resume()
            self._stream.enter_device(device)
        if self._parked is not None:
            self._parked.resume()
            self._parked = None
        try:
            with device.lane(Lane.COMPUTE, f"forward of pack {pack}, microbatch {self.index}"):
                self._greenlet.switch()
        finally:
            self._parked = base.park()
            if self._stream is not None:
                self._stream.suspend()
                self._stream.leave_device(self._device)

    def follow(self, device: Device) -> None:
        """Called within the greenlet, which goes on without a switch: the random stream comes along to the device."""
        if self._stream is not None and device is not self._device:
            assert self._device is not None
            self._stream.leave_device(self._device)
            self._stream.enter_device(device)
            self._device = device

    def kill(self) -> None:
        """End the user's code where it stands; its `finally` blocks and context managers run."""
        if self._greenlet is not None and not self._greenlet.dead:
            base = ThreadState()
            if self._parked is not None:
                self._parked.resume()
                self._parked = None
            try:
                self._greenlet.throw(greenlet.GreenletExit)
            except BaseException:  # user code that answers its end with an error of its own: the first error counts
                pass
            finally:
                base.park()
        self.forget()

    def forget(self) -> None:
        """The step is over. Tensors held here hold graph nodes, and those hold this: nobody else would end that."""
        for segment in self.segments:
            segment.close()
        self.segments.clear()
        self.pending.clear()
        self._luggage = self.waiting = self.joint = None
        self.replaced.clear()
        self.result = None

    def deposit(self, edge: GradientEdge, gradient: Arrival) -> None:
        """Hand in a gradient for a tensor of an older segment, on that segment's device."""
        refuse_others(self.index, edge.node)
        self.pending.setdefault((edge.node, edge.output_nr), (edge, []))[1].append(gradient)

    def backward_segment(self) -> None:
        """Differentiate the youngest segment from the gradients that have arrived for it, and forget it."""
        segment = self.segments.pop()
        mine = [k for k in self.pending if k[0]._sequence_nr() >= segment.start]
        arrived = [self.pending.pop(key) for key in mine]
        segment.close()
        self._in_backward = segment
        has_glue = segment.has_glue or not self.is_cut
        try:
            if arrived:
                name = f"backward of pack {segment.pack}, microbatch {self.index}"
                lane, state = segment.device.lane(Lane.COMPUTE, name), self._state
                with lane, differentiating(state, segment.device, has_glue=has_glue):
                    with torch._C.DisableTorchFunction():
                        gradients = state.memory.with_room(
                            segment.device, lambda: [_total(parts) for _, parts in arrived]
                        )
                    edges = [edge for edge, _ in arrived]
                    del arrived
                    accumulate(edges, gradients)
            if segment.partial:
                with torch._C.DisableTorchFunction(), torch.no_grad():
                    segment.add_partial_gradients()
        finally:
            self._in_backward = None


def sending_ahead(
    given: Iterable[Sequence[Microbatch]], num_ahead: int, limit_nbytes: int
) -> Iterator[Sequence[Microbatch]]:
    """The groups in turn. What `num_ahead` of those that follow need has set out by then, and what more of them need as
    long as that takes no more than `limit_nbytes`: sent later, it would be in the way of what the first ones send back."""
    groups = list(given)
    num_sent = total = 0
    for index, group in enumerate(groups):
        while num_sent < len(groups):
            nbytes = _luggage_nbytes(groups[num_sent])
            if num_sent > index + num_ahead and total + nbytes > limit_nbytes:
                break
            for microbatch in groups[num_sent]:
                microbatch.send_ahead()
            num_sent, total = num_sent + 1, total + nbytes
        total -= _luggage_nbytes(group)
        yield group


def _luggage_nbytes(group: Sequence[Microbatch]) -> int:
    return sum(microbatch.luggage_nbytes for microbatch in group)


class Luggage:
    """What a parked microbatch will need in its next pack, as it was when it parked."""

    def __init__(self, segment: Segment, needed: Iterable[torch.Tensor]) -> None:
        self._state = segment.state
        self._home = segment.device
        with torch._C.DisableTorchFunction():
            self._needed = [
                tensor
                for tensor in (segment.replaced.get(id(t), (None, t))[1] for t in needed)
                if tensor.device == self._home.torch_device and segment.state.weight_name(tensor) is None
            ]
        self._ready = self._home.record(Lane.COMPUTE) if self._needed else None
        self.sent: Copies = {}
        self.nbytes = sum(tensor.nbytes for tensor in self._needed)

    def send(self, target: Device) -> None:
        needed, self._needed = self._needed, []
        if target is self._home:
            return
        with torch._C.DisableTorchFunction(), torch.no_grad():
            for tensor in needed:
                arrival = self._state.send(tensor.detach(), self._home, target, self._ready)
                self.sent[id(tensor)] = (tensor, version_of(tensor), arrival)


def _total(parts: Sequence[Arrival]) -> torch.Tensor:
    first, *others = parts
    total = first.take()
    for part in others:
        total = total + part.take()
    return total
